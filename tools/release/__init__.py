"""Builds and checks the files of a release: `make wheels`.

`build` makes the sdist and compiles a wheel for each platform from it; `checks` audits the wheels and loads them.
"""
