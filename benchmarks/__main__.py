"""``python -m benchmarks``: time the operators on this GPU and write ``benchmarks/results/<gpu>/<operator>.json``."""

import argparse

from benchmarks import bench_dual_stream, bench_group_norm, bench_pyramid, bench_temporal, bench_temporal_conv, record
from benchmarks.levels import LEVELS, QUICK

BENCHES = {
    bench.OP: bench
    for bench in (bench_pyramid, bench_dual_stream, bench_temporal, bench_temporal_conv, bench_group_norm)
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", choices=BENCHES, action="append", help="only this operator (may be repeated)")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(QUICK))
    parser.add_argument("--batch", nargs="+", type=int, default=[2])
    parser.add_argument("--tables", nargs="+", choices=bench_pyramid.TABLES, default=list(bench_pyramid.TABLES))
    parser.add_argument("--only", nargs="+", help="only these implementations")
    parser.add_argument("--print", action="store_true", help="print the rows and write no file")
    options = parser.parse_args()
    for op in options.op or BENCHES:
        more = {"kinds": options.tables} if op == bench_pyramid.OP else {}
        rows = BENCHES[op].rows(options.levels, options.batch, only=options.only, **more)
        for row in rows:
            print(_line(row))
        if not options.print:
            print(record.write(op, rows))


def _line(row: dict) -> str:
    head = f"{row['level']:10} {row['direction']} B{row['batch']} {row.get('table', ''):9} {row['implementation']:36}"
    if "failure" in row:
        return f"{head} {row['failure']}"
    return f"{head} {row['ms']:9.4f} ms {row['tflops']:7.1f} TFLOP/s {row.get('gbs', 0):6.0f} GB/s"


if __name__ == "__main__":
    main()
