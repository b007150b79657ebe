"""Fill the tables of the documents from the committed results: python .ci/readme.py (--check only compares).

A block between <!-- KIND FILE --> and <!-- end --> is made from that file by the function `KIND` below: what
the program that wrote the file prints, or a sentence about it.
"""

import json
import re
import sys
from pathlib import Path

root = Path(__file__).parent.parent
sys.path[:0] = [str(root), str(root / 'tests')]
from measure_plan import table as plan_rows  # noqa: E402
from measure_stream import table as stream_rows  # noqa: E402
from run.beside import beside_lines  # noqa: E402
from run.report import markdown, table as result_rows  # noqa: E402
from run.speed import claims, milliseconds, model_lines, roofline  # noqa: E402
from study.ablations import ablation_table  # noqa: E402
from study.analysis import findings  # noqa: E402
from study.bases import bases_table  # noqa: E402
from study.frontier import frontier_table  # noqa: E402
from study.published import published_table  # noqa: E402

DOCUMENTS = 'README.md', 'study/README.md', 'scale/README.md', 'hub/README.md', 'assets/bench.md'


def table(r):
    stages = ', '.join(f'{stage} {seconds:.0f} s' for stage, seconds in r['seconds'].items())
    return (
        f'{result_rows(r["rows"])}\n\nBase model {r["bits_per_byte"]:.3f} bits per byte on held-out text; '
        f'{r["allocator_params"]:,} allocator weights; seed {r["seed"]}; {stages}; '
        f'peak memory {r["peak_gb"]:.1f} GB.'
    )


def frontier(r):
    note = (f'{r["tokens"]:,} held-out tokens of {r["documents"]} files, torch {r["torch"]}; ± is one '
            f'standard error: tokens clustered by file, and the spread over seeds.')
    return f'{frontier_table(r["rows"])}\n\n{note}'


def bases(r):
    base = r['deep']
    note = (f'{base["seeds"]} seeds where trained; torch {base["torch"]}; ± is one standard error: tokens '
            f'clustered by file, and the spread over seeds.')
    return f'{bases_table(r)}\n\n{note}'


def published(r):
    return published_table(r)


def ablations(r):
    note = f'{r["steps"]} PPO steps each, one seed: differences below one thousandth mean little.'
    return f'{ablation_table(r)}\n\n{note}'


def analysis(r):
    return findings(r)


def tried(r):
    lines = [[row['what'], f'{1000 * row["difference"]:+.1f} ± {1000 * row["se"]:.1f}'] for row in r['rows']]
    return f'{markdown(["what", "minus expert skipping (10⁻³ nats/token)"], lines)}\n\n({r["note"]})'


def caption(r):
    return (
        f'({r["machine"]}, torch {r["torch"]}; copy {r["reached"]["copy"] / 1e9:.0f} GB/s, matmul '
        f'{r["reached"]["float32"] / 1e12:.2f} TFLOP/s in float32, {r["reached"]["bfloat16"] / 1e12:.2f} in '
        f'bfloat16; {r["seconds"]:.0f} s)'
    )


def speed(r):
    """At most ten rows: prefill and one token, of every shape and dtype."""
    rows = [
        row for row in r['dispatch'] if row['stage'] == 'prefill' or (row['stage'], row['T']) == ('decode', 1)
    ]
    return f'{claims(rows)}\n\n{caption(r)}'


def beside(r):
    return beside_lines(r['beside'])


def whole_model(r):
    m = r['model']
    sizes = ', '.join(f'{name} {m[name]}' for name in ('C', 'F', 'N', 'K', 'layers', 'V', 'T', 'dtype'))
    return f'{model_lines(m)}\n\n({sizes}; decode at batch 1, {m["new"]} tokens behind 16)'


def bench(r):
    rows = r['dispatch']
    parts = [caption(r), '## A whole model', whole_model(r), '## Beside transformers', beside(r),
             '## The experts of one layer',
             'By the path that the model takes:', claims(rows), '## Roofline', roofline(rows),
             '## Every path in milliseconds', milliseconds(rows)]
    return '\n\n'.join(parts)


def plan(r):
    runs = '; '.join(f'{row["size"]}: {row["predicted"]:.0f} and {row["measured"]:.0f} '
                     f'({row["predicted"] / row["measured"]:.2f})' for row in r['runs'])
    return f'{plan_rows(r)}\n\nPredicted and measured seconds of a whole run on this machine: {runs}.'


def stream(r):
    run = r['run']
    return (f'{stream_rows(r)}\n\n({r["machine"]}, torch {r["torch"]}; {r["layers"]} layers of C {r["C"]}, '
            f'F {r["F"]} in bf16; medians and quartiles.) The same {r["gb"]:.1f} GB train to the end under '
            f'`ulimit -v` of {run["limit_gb"]:.1f} GB, with a peak of {run["peak_gb"]:.1f} GB resident.')


def ranks(r):
    alone, of_two = r['share']['1'], r['share']['2']
    return (f'Two gloo ranks against one, {r["steps"]} steps: the allocators differ by at most '
            f'{r["difference"]:.1e} (largest weight {r["largest_weight"]:.1f}). Peak memory with '
            f'{r["gb"]:.2f} GB of weights, above {r["imported_gb"]:.2f} GB of Python and torch: '
            f'{alone:.2f} of the weights alone, {of_two:.2f} on each of two ranks.')


def kills(r):
    found = ', '.join(f'{n} in {stage.replace("ppo", "PPO")}' for stage, n in r['found_in'].items())
    bits = 'have the bits' if r['same_bits'] else 'DO NOT have the bits'
    return (f'{r["kills"]} times SIGKILL at random moments of a small run ({found}), each resumed: the final '
            f'allocators {bits} of an undisturbed run; after each kill every file could be read.')


def text(path):
    return f'```\n{path.read_text().strip()}\n```'


def fill(match):
    kind, name = match.groups()
    path = root / name
    shown = text(path) if kind == 'text' else globals()[kind](json.loads(path.read_text()))
    return f'<!-- {kind} {name} -->\n{shown}\n<!-- end -->'


stale = []
for name in DOCUMENTS:
    old = (root / name).read_text()
    new = re.sub(r'<!-- (\w+) (\S+) -->.*?<!-- end -->', fill, old, flags=re.DOTALL)
    if new != old:
        stale.append(name)
        if '--check' not in sys.argv:
            (root / name).write_text(new)
if stale and '--check' in sys.argv:
    sys.exit(f'{", ".join(stale)}: not what the results say: run python .ci/readme.py')
