"""Running chapters outside Jupyter: single runs, sweeps, collected results, the rendered site, the command `fishlib`.

From Python, ``fishlib.rerun.results()`` is the table of all runs and ``fishlib.rerun.stored()`` that of the full-size
runs that the repository keeps, which ``side_by_side`` shows in a chapter; importing this package loads neither papermill
nor dask nor pandas.
"""

from fishlib.rerun.collect import results, side_by_side, stored, summary

__all__ = ["results", "side_by_side", "stored", "summary"]
