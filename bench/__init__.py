"""Microbenchmarks: ``make bench`` or `fastdistill bench` shows every op beside its rivals.

`harness` proves and times, `bench_<op>` holds an op's cases, `device` is the run for a GPU.
"""
