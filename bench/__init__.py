"""corewise's benchmarks: ``python -m bench --list``. Each writes JSON into ``bench/results``."""
