"""Tools that stand on the package: benchmarks, the pagemap inspector, the soak test. Installed as `iobmd.tools`."""
