"""Fill the tables of the documents from the committed results: python .ci/readme.py (--check only compares).

A block between <!-- KIND FILE --> and <!-- end --> is made from that file by the function `KIND` below: what
the program that wrote the file prints, with a sentence about it.
"""
import json
import re
import sys
from pathlib import Path

root = Path(__file__).parent.parent
sys.path[:0] = [str(root), str(root / 'tests')]
from measure_scale import plan_lines as plan, stream_lines as stream  # noqa: E402, F401
from run.report import markdown, table as result_rows  # noqa: E402
from run.speed import speed_table  # noqa: E402
from study.analysis import findings as analysis  # noqa: E402, F401
from study.bases import columns  # noqa: E402
from study.frontier import table as policy_table  # noqa: E402
from study.recipes import recipe_table as recipes  # noqa: E402, F401
from study.study import thousandths  # noqa: E402

WAYS = {
    'published': 'published: goes to those that run',
    'kept': 'goes to nobody',
    'stand-ins': 'stays, with a stand-in',
}
DOCUMENTS = 'README.md', 'study/README.md', 'scale/README.md', 'hub/README.md', 'assets/bench.md'


def table(r):
    stages = ', '.join(f'{stage} {seconds:.0f} s' for stage, seconds in r['seconds'].items())
    minutes = sum(r['seconds'].values()) / 60
    note = (f'{minutes:.0f} minutes. Base {r["bits_per_byte"]:.3f} bits per byte on held-out text; '
            f'{r["allocator_params"]:,} allocator weights; seed {r["config"]["seed"]}; {stages}.')
    return f'{result_rows(r["rows"])}\n\n{note}'


def note_of(base):
    return f'One seed, torch {base["torch"]}; ± is one standard error, tokens clustered by file.'


def bases(r):
    return f'{policy_table(columns(r))}\n\n{note_of(r["deep"]["stand-ins"])}'


def costs(r):
    """What 25% fewer experts cost on two bases: at random, by the best free rule, by Ada-K."""
    bases = {name: r[name] for name in ('deep', 'prose')}
    heads = [f'{name}: {who}' for name in bases for who in ('random-mix', 'best free rule', 'ada-k')]
    lines = []
    for way, title in WAYS.items():
        cells = []
        for base in bases.values():
            rows = rows_of(base, way)
            free = rows['ada-k']['best_free']['method']        # chosen on training text
            cells += [thousandths(rows[method]) for method in ('random-mix', free, 'ada-k')]
        lines.append([title, *cells])
    full = [f'{thousandths(rows_of(base, "beyond")["ada-k"])} on {name}' for name, base in r.items()]
    return (f'{markdown(["the weight of a dropped expert", *heads], lines)}\n\n'
            f'With as many FLOPs as top-k (`--budget 1 --beyond 1`) ada-k has {", ".join(full)}. '
            f'(1 seed; ± is one standard error, clustered by file.)')


def rows_of(base, way):
    [rows] = base[way]['columns'].values()
    return rows


def frontier(r):
    note = (f'{r["tokens"]:,} held-out tokens of {r["documents"]} files, torch {r["torch"]}; '
            f'± is one standard error.')
    return f'{policy_table(r["columns"])}\n\n{note}'


def tried(r):
    lines = []
    for row in r['rows']:
        lines.append([row['what'], thousandths(row, 'difference', 'se')])
    return f'{markdown(["what", "minus skip (10⁻³ nats/token)"], lines)}\n\n({r["note"]})'


def bench(r):
    reached = r['reached']
    machine = (f'({r["machine"]}, torch {r["torch"]}; copy {reached["copy"] / 1e9:.0f} GB/s, matmul '
               f'{reached["float32"] / 1e12:.2f} TFLOP/s in float32, {reached["bfloat16"] / 1e12:.2f} '
               f'in bfloat16; {r["seconds"]:.0f} s)')
    return '\n\n'.join([machine, '## Whole models', speed_table(r['beside']),
                        '## The experts of one layer', speed_table(r['dispatch'])])


def fill(match):
    kind, name = match.groups()
    result = json.loads((root / name).read_text())
    return f'<!-- {kind} {name} -->\n{globals()[kind](result)}\n<!-- end -->'


stale = []
for name in DOCUMENTS:
    path = root / name
    old = path.read_text()
    new = re.sub(r'<!-- (\w+) (\S+) -->.*?<!-- end -->', fill, old, flags=re.DOTALL)
    if new != old:
        stale.append(name)
        if '--check' not in sys.argv:
            path.write_text(new)
if stale and '--check' in sys.argv:
    sys.exit(f'{", ".join(stale)}: not what the results say: run python .ci/readme.py')
