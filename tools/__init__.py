"""Tools that stand on the package: benchmarks (`iobmd bench`), the pagemap inspector, the soak test. Installed as `iobmd.tools`."""
