"""Tools that stand on the package: benchmarks (`iobmd bench`). Installed as `iobmd.tools`."""
