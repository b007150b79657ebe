"""study/bases.py: does it hold on a base that the recipe was not tuned on? -> out/bases/bases.json, .png, the
table.

    python -m study.bases              three bases, every policy at 0.75 K; a stopped one goes on where it was
    python -m study.bases deep prose      some of them

    deep     the default, Mixtral in small: top-2 of 8, 16 layers, the sources of Python's standard library
    fine     finer experts: top-4 of 16, 4 layers, the same text
    prose    top-2 of 8, 4 layers, English: the docstrings and comments of these sources

Each base is a preset of train.py, learnt in out/NAME if it is not there; its rows stay in out/NAME/frontier.
"""
from pathlib import Path


from hub.files import InputError, write_json
from run.console import OneLineParser, one_line_errors, open_out
from run.report import markdown, plt, save_figure
from study.frontier import LOOKS, SKIPPING, TRAINING_FREE, measure
from study.study import BUDGETS, study_at
from train import PRESETS, Settings

BASES = 'deep', 'fine', 'prose'
SHOWN = 'random mix', 'Top-P', *SKIPPING, 'published recipe, dialled', 'learnt without RL', 'Ada-K'


def at_budget(base):
    """{method: its row at the budget of the comparison}."""
    return {r['method']: r for r in base['rows'] if r['budget'] == base['budget']}


def bases_table(results):
    """Loss minus Top-K in thousandths of a nat per token, a column a base; under it Ada-K's leads, paired."""
    def shown(r):
        return f'{1000 * r["delta"]:+.1f} ± {1000 * r["delta_se"]:.1f}'
    columns = [at_budget(base) for base in results.values()]
    lines = [[method, str(columns[0][method]['seeds']), *(shown(rows[method]) for rows in columns)]
             for method in SHOWN]
    ada = [rows['Ada-K'] for rows in columns]
    for name, title in (('best_free', 'the best row without training'), ('no_rl', 'learnt without RL')):
        leads = (f'*{1000 * r[name]["at_equal_k"]:+.1f} ± {1000 * r[name]["se"]:.1f}*' for r in ada)
        lines.append([f'*Ada-K minus {title}, at equal mean k*', '', *leads])
    lines.append(['Ada-K, mean k / K', '', *(f'{r["mean_k"] / base["K"]:.3f}'
                                            for r, base in zip(ada, results.values()))])
    return markdown(['10⁻³ nats/token, minus Top-K', 'seeds', *results], lines)


def bases_figure(path, results):
    """One panel a base: every policy's loss minus Top-K, with one standard error."""
    fig, axes = plt.subplots(1, len(results), figsize=(3 + 3 * len(results), 3.4), layout='constrained',
                             sharey=True, squeeze=False)
    for ax, (name, base) in zip(axes[0], results.items()):
        rows = at_budget(base)
        for y, method in enumerate(SHOWN[::-1]):
            color, marker, _ = LOOKS[method]
            r = rows[method]
            x, error = 1000 * r['delta'], 1000 * r['delta_se']
            ax.errorbar(x, y, xerr=error, color=color, marker=marker, linestyle='')
        free = min(1000 * rows[method]['delta'] for method in TRAINING_FREE if method in rows)
        ax.axvline(free, color='black', linewidth=0.8, linestyle=':', label='best without training')
        ax.axvline(free / 2, color='black', linewidth=0.8, linestyle='--', label='half of it')
        ax.set(title=f'{name}: top-{base["K"]}', xlabel='loss minus Top-K (10⁻³ nats/token)', xlim=(0, None),
               yticks=range(len(SHOWN)), yticklabels=SHOWN[::-1])
        ax.grid(axis='x', alpha=0.3)
    axes[0][0].legend(fontsize=8)
    save_figure(fig, path)


def main(argv=None):
    p = OneLineParser(__doc__)
    p.add_argument('names', nargs='*', help=f'which bases (default: {" ".join(BASES)})')
    p.add_argument('--out', default='out', help='where the bases and their rows are (default out)')
    p.add_argument('--quick', action='store_true', help='every base at smoke size, one seed, for tests')
    a = p.parse_args(argv)
    for name in a.names:
        if name not in BASES:
            raise InputError(f'{name}: no such base, use some of {", ".join(BASES)}')
    results, budget = {}, BUDGETS[1]
    for name in a.names or BASES:
        out = open_out(Path(a.out) / name)
        changes = {**PRESETS[name], **PRESETS['smoke']} if a.quick else PRESETS[name]
        print(f'--- {name}', flush=True)
        study = study_at(Settings(**{**changes, 'preset': name, 'out': str(out)}), out, 'frontier', a.quick)
        results[name] = {'budget': budget, **measure(study, [budget], 1 if a.quick else 3, SHOWN)}
    out = open_out(Path(a.out) / 'bases')
    write_json(out / 'bases.json', results)
    print(bases_table(results))
    bases_figure(out / 'bases.png', results)
    seconds = sum(base['seconds'] for base in results.values())
    print(f'{seconds:.0f} s in all; wrote bases.json and bases.png in {out}')


if __name__ == '__main__':
    one_line_errors('study.bases', main)
