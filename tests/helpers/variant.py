"""Runs the module that its first argument names as python -m does, for forked.Run."""

import runpy
import sys


def main():
    runpy.run_module(sys.argv.pop(1), run_name="__main__")
