"""`python -m dcnlib info`, `bench` and `demo`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0, or 1 with a message on stderr."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter less is better than no result
    try:
        options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError, ValueError) as error:
        print(f"dcnlib: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndcnlib: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dcnlib", description="Deformable convolution.")
    commands = parser.add_subparsers(required=True, metavar="{info,bench,demo}")

    info = commands.add_parser("info", help="what is installed, what runs, and why not")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="speed on this machine")
    bench.add_argument("--rounds", type=int, default=5, help="medians of this many (default 5)")
    form = bench.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs")
    form.add_argument("--markdown", action="store_true", help="as a table in Markdown")
    form.add_argument("--write", metavar="FILE", help="put that table between FILE's markers")
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="train on deformed digits, plain and deformable")
    size = demo.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", dest="size", action="store_const", const="quick", help="seconds; only a check"
    )
    size.add_argument("--full", dest="size", action="store_const", const="full", help="three seeds")
    demo.add_argument("--output", metavar="DIR", default="demo-output", help="for what it makes")
    demo.add_argument("--write", metavar="FILE", help="put the table between FILE's markers")
    demo.add_argument("--seed", type=int, default=0, help="of the networks (default 0)")
    demo.set_defaults(run=_demo, size="default")
    return parser


def _info(options: argparse.Namespace) -> None:
    from ._info import collect, text

    report = collect()
    print(json.dumps(report, indent=2) if options.json else text(report))


def _bench(options: argparse.Namespace) -> None:
    from . import _bench as module
    from ._markdown import find_block, write_block

    if options.rounds < 1:
        raise ValueError(
            f"bench: rounds: must be positive; expected 1 or more, got {options.rounds}"
        )
    if options.write:
        find_block(options.write, module.BLOCK)
    report = module.bench(options.rounds)
    if options.json:
        print(json.dumps(report, indent=2))
    elif options.markdown:
        print(module.markdown(report))
    elif options.write:
        write_block(options.write, module.BLOCK, module.markdown(report))
    else:
        print(module.text(report))


def _demo(options: argparse.Namespace) -> None:
    from . import demo
    from ._markdown import find_block, write_block

    if options.write:
        find_block(options.write, demo.BLOCK)
    results = demo.run(options.size, options.output, options.seed)
    if options.write:
        write_block(options.write, demo.BLOCK, demo.markdown(results))


if __name__ == "__main__":
    sys.exit(main())
