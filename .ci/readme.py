"""Fill the README's tables from the committed results: python .ci/readme.py (--check only compares).

A block between <!-- KIND FILE --> and <!-- end --> is made from that file: `table` the rows as train.py prints them, `frontier`, `ablations`,
`analysis` and `bench` what bench.py prints, `plan`, `stream`, `ranks` and `kills` what tests/measure_*.py found, `tried` a list of trials,
`text` the file itself.
"""
import json
import re
import sys
from pathlib import Path

root = Path(__file__).parent.parent
sys.path[:0] = [str(root), str(root / 'tests')]
from train import table  # noqa: E402

readme = root / 'README.md'
old = readme.read_text()


def tried(match):
    r = json.loads((root / match[1]).read_text())
    lines = '\n'.join(f'| {row["what"]} | {1000 * row["difference"]:+.1f} ± {1000 * row["se"]:.1f} |' for row in r['rows'])
    return f'<!-- tried {match[1]} -->\n| what | minus expert skipping (10⁻³ nats/token) |\n|---|---|\n{lines}\n\n({r["note"]})\n<!-- end -->'


def fill(match):
    results = json.loads((root / match[1]).read_text())
    stages = ', '.join(f'{stage} {seconds:.0f} s' for stage, seconds in results['seconds'].items())
    note = (f'Base model {results["bits_per_byte"]:.3f} bits per byte on held-out text; {results["allocator_params"]:,} allocator weights; '
            f'seed {results["seed"]}; {stages}; peak memory {results["peak_gb"]:.1f} GB.')
    return f'<!-- table {match[1]} -->\n{table(results["rows"])}\n\n{note}\n<!-- end -->'


def quote(match):
    return f'<!-- text {match[1]} -->\n```\n{(root / match[1]).read_text().strip()}\n```\n<!-- end -->'


def benched(match):
    from bench import claims, milliseconds, model_lines, roofline
    r = json.loads((root / match[1]).read_text())
    m = r['model']
    caption = (f'{r["machine"]}, torch {r["torch"]}; copy {r["reached"]["copy"] / 1e9:.0f} GB/s, matmul '
               f'{r["reached"]["float32"] / 1e12:.2f} TFLOP/s in float32, {r["reached"]["bfloat16"] / 1e12:.2f} in bfloat16; {r["seconds"]:.0f} s')
    sizes = ', '.join(f'{name} {m[name]}' for name in ('C', 'F', 'N', 'K', 'layers', 'V', 'T', 'dtype'))
    return (f'<!-- bench {match[1]} -->\n({caption})\n\nA whole model ({sizes}; decode at batch 1, {m["new"]} tokens behind 16):\n\n{model_lines(m)}\n\n'
            f'The experts of one layer, by the path that the model takes:\n\n{claims(r["dispatch"])}\n\n'
            f'<details><summary>Roofline: what this machine could do</summary>\n\n{roofline(r["dispatch"])}\n\n</details>\n\n'
            f'<details><summary>Every path in milliseconds</summary>\n\n{milliseconds(r["dispatch"])}\n\n</details>\n<!-- end -->')


def studied(match):
    """What bench.py prints for the results of --frontier, --ablations and --analysis."""
    import bench
    kind, name = match.groups()
    r = json.loads((root / name).read_text())
    if kind == 'frontier':
        shown = bench.frontier_table(r['rows']) + (
            f'\n\n{r["tokens"]:,} held-out tokens of {r["documents"]} files, {r["threads"]} CPU cores, torch {r["torch"]}, {r["seconds"] / 60:.0f} minutes '
            f'in all; ± is one standard error: tokens clustered by file, and the spread over seeds.')
    elif kind == 'ablations':
        shown = bench.ablation_table(r) + f'\n\n{r["steps"]} PPO steps each, one seed: differences below one thousandth mean little.'
    else:
        shown = bench.findings(r)
    return f'<!-- {kind} {name} -->\n{shown}\n<!-- end -->'


def scaled(match):
    """Plans, streaming, ranks and kills, as tests/measure_*.py wrote them."""
    kind, name = match.groups()
    r = json.loads((root / name).read_text())
    if kind == 'plan':
        from measure_plan import table as plans
        shown = plans(r) + '\n\n' + 'Predicted and measured seconds of a whole run on this machine: ' + '; '.join(
            f'{row["size"]}: {row["predicted"]:.0f} and {row["measured"]:.0f} ({row["predicted"] / row["measured"]:.2f})' for row in r['runs']) + '.'
    elif kind == 'stream':
        from measure_stream import table as visits
        run = r['run']
        shown = (f'{visits(r)}\n\n({r["machine"]}, torch {r["torch"]}; {r["layers"]} layers of C {r["C"]}, F {r["F"]} in bf16; medians and quartiles.) '
                 f'The same {r["gb"]:.1f} GB train to the end under `ulimit -v` of {run["limit_gb"]:.1f} GB, with a peak of {run["peak_gb"]:.1f} GB '
                 f'resident.')
    elif kind == 'ranks':
        shown = (f'Two gloo ranks against one, {r["steps"]} steps: the allocators differ by at most {r["difference"]:.1e} (largest weight '
                 f'{r["largest_weight"]:.1f}). Peak memory with {r["gb"]:.2f} GB of weights, above {r["imported_gb"]:.2f} GB of Python and torch: '
                 f'{r["share"]["1"]:.2f} of the weights alone, {r["share"]["2"]:.2f} on each of two ranks.')
    else:
        found = ', '.join(f'{n} in {stage.replace("ppo", "PPO")}' for stage, n in r['found_in'].items())
        shown = (f'{r["kills"]} times SIGKILL at random moments of a small run ({found}), each resumed: the final allocators '
                 f'{"have the bits" if r["same_bits"] else "DO NOT have the bits"} of an undisturbed run; after each kill every file could be read.')
    return f'<!-- {kind} {name} -->\n{shown}\n<!-- end -->'


new = re.sub(r'<!-- bench (\S+) -->.*?<!-- end -->', benched, old, flags=re.DOTALL)
new = re.sub(r'<!-- (frontier|ablations|analysis) (\S+) -->.*?<!-- end -->', studied, new, flags=re.DOTALL)
new = re.sub(r'<!-- (plan|stream|ranks|kills) (\S+) -->.*?<!-- end -->', scaled, new, flags=re.DOTALL)
new = re.sub(r'<!-- tried (\S+) -->.*?<!-- end -->', tried, new, flags=re.DOTALL)
new = re.sub(r'<!-- text (\S+) -->.*?<!-- end -->', quote, new, flags=re.DOTALL)
new = re.sub(r'<!-- table (\S+) -->.*?<!-- end -->', fill, new, flags=re.DOTALL)
if '--check' in sys.argv:
    sys.exit(0 if new == old else 'README.md is not what the results say: run python .ci/readme.py')
readme.write_text(new)
