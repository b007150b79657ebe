"""run/speed.py: the tables and figures of bench.json, which bench.py measures.

A row of the dispatch table is one shape, dtype, stage, number of tokens, path and plan (everyone K, or
variable k).
"""

from run.report import BLUE, GREEN, GREY, ORANGE, RED, SKY, markdown, plt, save_figure

# the parts of a forward pass: (colour, hatch)
PARTS = {'experts': (BLUE, ''), 'attention': (ORANGE, '//'), 'head': (SKY, '..'), 'router': (GREEN, 'xx'),
         'allocator': (RED, ''), 'rest': (GREY, '')}
CASE = 'shape', 'dtype', 'stage', 'T'


def by_case(rows):
    """{(shape, dtype, stage, T): ({path: row at top-K}, {path: row at about 0.75 K})}."""
    cases = {}
    for r in rows:
        plans = cases.setdefault(tuple(r[name] for name in CASE), ({}, {}))
        plans[r['variable']][r['path']] = r
    return cases


def best_peer(paths):
    """The fastest of transformers' rows in {path: row}, None where there is none."""
    peers = (r for path, r in paths.items() if path.startswith('transformers'))
    return min(peers, key=lambda r: r['ms'], default=None)


def default_path(paths):
    """The row of the path that a model takes in this case."""
    return next(r for r in paths.values() if r['default'])


# ---------------------------------------------------------------- tables

def claims(rows):
    """What the dispatch rows say, a line a case: ours against itself, same-FLOPs matmuls, transformers."""
    def over(a, b):
        return f'{a["ms"] / b["ms"]:.2f}' if a and b else ''
    lines = []
    for case, (top, less) in by_case(rows).items():
        ours, fewer, peer = default_path(top), default_path(less), best_peer(top)
        dense = top.get('dense pair')
        mean_k = f'{fewer["mean_k"]:.3g} / {ours["mean_k"]:.3g}'
        lines.append([*map(str, case), mean_k, over(fewer, ours), over(dense, ours), over(ours, peer),
                      over(fewer, peer)])
    return markdown([*CASE, 'mean k / K', 'our time / ours at K', 'dense pair / ours, K',
                     'ours / best of transformers, both K', 'ours at mean k / its K'], lines)


def milliseconds(rows):
    """Every path of the dispatch table with its quartiles."""
    def ms(r):
        return f'{r["ms"]:.2f} ({r["low"]:.2f}-{r["high"]:.2f})' if r else ''
    lines = []
    for case, (top, less) in by_case(rows).items():
        lines += [[*map(str, case), path, ms(r), ms(less.get(path))] for path, r in top.items()]
    return markdown([*CASE, 'path', 'top-K ms', '0.75 K ms'], lines)


def roofline(rows):
    """Bytes and FLOPs of each case, the time that this machine's own rates allow, and the share reached."""
    lines = []
    for case, plans in by_case(rows).items():
        for r in map(default_path, plans):
            if 'flops' in r:
                lines.append([*map(str, case), f'{r["mean_k"]:g}', f'{r["flops"] / 1e9:.3g}',
                              f'{r["bytes"] / 1e6:.3g}', r['bound'], f'{r["limit_ms"]:.2f}', f'{r["ms"]:.2f}',
                              f'{r["of_limit"]:.0%}'])
    return markdown([*CASE, 'mean k', 'GFLOP', 'MB', 'bound', 'limit ms', 'ours ms', 'of limit'], lines)


def model_lines(table):
    """The model table, with the speed-up of each row over the first."""
    top, lines = table['rows'][0], []
    for r in table['rows']:
        speeds = (f'{r[name]:.1f} ({r[name] / top[name]:.2f}x)' for name in
                  ('prefill_tokens_per_s', 'decode_tokens_per_s'))
        shares = (f'{r["share_of_prefill"].get(part, 0):.1%}' for part in PARTS)
        lines.append([r['policy'], f'{r["prefill_mean_k"]:.2f}, {r["decode_mean_k"]:.2f}', *speeds, *shares])
    head = ['policy', 'mean k in prefill, decode', 'prefill tokens/s', 'decode tokens/s', *PARTS]
    return markdown(head, lines)


# ---------------------------------------------------------------- figures

def dispatch_figure(path, rows, machine):
    """A panel per shape and dtype: every path's prefill at top-K (hollow) and 0.75 K, with quartiles."""
    cases = {case: plans for case, plans in by_case(rows).items() if case[2] == 'prefill'}
    shapes, dtypes = (list(dict.fromkeys(case[i] for case in cases)) for i in (0, 1))
    fig, axes = plt.subplots(len(dtypes), len(shapes), figsize=(2 + 3 * len(shapes), 0.6 + 2.5 * len(dtypes)),
                             layout='constrained', sharey=True, squeeze=False)
    names = list(dict.fromkeys(name for top, _ in cases.values() for name in top))[::-1]
    looks = ('top-K', 'black', 'white'), ('mean k 0.75 K', BLUE, BLUE)
    for case, plans in cases.items():
        ax = axes[dtypes.index(case[1])][shapes.index(case[0])]
        for paths, (label, color, fill) in zip(plans, looks):
            shown = [r for name, r in paths.items() if name in names]
            ms, low, high = ([r[key] for r in shown] for key in ('ms', 'low', 'high'))
            error = [[m - x for m, x in zip(ms, low)], [x - m for m, x in zip(ms, high)]]
            places = [names.index(r['path']) for r in shown]
            ax.errorbar(ms, places, xerr=error, fmt='o', color=color, mfc=fill, label=label)
        ax.set(title=f'{case[0]}, {case[1]}, T = {case[3]}', xlabel='ms', xlim=(0, None),
               yticks=range(len(names)), yticklabels=names)
        ax.title.set_fontsize(9)
        ax.grid(axis='x', alpha=0.3)
    axes[0][0].legend(fontsize=8)
    fig.suptitle(f'experts of one layer, forward: {machine}', fontsize=10)
    save_figure(fig, path)


def roofline_figure(path, rows, reached):
    """Reached FLOP/s against FLOPs per byte, under the machine's own matmul rate and copy bandwidth."""
    fig, ax = plt.subplots(figsize=(6, 3.8), layout='constrained')
    looks = {'float32': (BLUE, '-'), 'bfloat16': (RED, '--')}
    counted = [r for plans in by_case(rows).values() for r in map(default_path, plans) if 'flops' in r]
    for dtype in dict.fromkeys(r['dtype'] for r in counted):
        color, line = looks[dtype]
        x = [0.1, reached[dtype] / reached['copy'], 1000]
        limit = [min(reached['copy'] * i, reached[dtype]) / 1e9 for i in x]
        ax.plot(x, limit, color=color, linestyle=line, label=f'limit, {dtype}')
        for stage, marker, fill in (('prefill', 'o', color), ('decode', '^', 'white')):
            shown = [r for r in counted if (r['dtype'], r['stage']) == (dtype, stage)]
            intensity, rate = zip(*((r['flops'] / r['bytes'], r['flops'] / r['ms'] / 1e6) for r in shown))
            ax.plot(intensity, rate, marker, color=color, mfc=fill, label=f'{stage}, {dtype}')
    ax.set(xscale='log', yscale='log', xlabel='FLOPs per byte', ylabel='GFLOP/s',
           title='experts of one layer against the machine')
    ax.legend(fontsize=8)
    save_figure(fig, path)


def model_figure(path, table):
    """Where the time of a prefill goes, and the speed-up."""
    fig, ax = plt.subplots(figsize=(7, 2.4), layout='constrained')
    rows = table['rows'][::-1]
    for y, r in enumerate(rows):
        left = 0
        for part, (color, hatch) in PARTS.items():
            width = r['share_of_prefill'].get(part, 0) * r['prefill']['ms']
            label = part if y == 0 else None
            ax.barh(y, width, left=left, color=color, hatch=hatch, edgecolor='white', label=label)
            left += width
    names = [f'{r["policy"]}, mean k {r["prefill_mean_k"]:.2f}' for r in rows]
    ax.set(yticks=range(len(names)), yticklabels=names, title='where the time of a whole model goes',
           xlabel=f'ms of a prefill of {table["B"]} x {table["T"]} tokens')
    ax.legend(fontsize=8, ncols=len(PARTS), loc='upper center', bbox_to_anchor=(0.5, -0.35))
    save_figure(fig, path)
