"""run/report.py: what a run shows: Markdown tables, log.csv, figures.

Colours are Okabe and Ito's, which survive colour-blindness; lines and markers differ too, for greyscale.
"""
import csv
import io
import os

from hub.files import write_whole

os.environ['MPLBACKEND'] = 'agg'        # figures go to files; the backend of a notebook may not exist here
import matplotlib.pyplot as plt  # noqa: E402

BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
SKY, PINK, GREY = '#56B4E9', '#CC79A7', '#999999'


def markdown(head, lines):
    """A Markdown table of strings."""
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in (head, ['---'] * len(head), *lines))


def table(rows):
    """The rows of results.json as a Markdown table."""
    lines = []
    for r in rows:
        delta = '' if r['method'] == 'top-k' else f'{r["delta"]:+.4f} ± {r["delta_se"]:.4f}'
        numbers = (f'{r[name]:.3f}' for name in ('mean_k', 'expert_flops', 'total_flops'))
        lines.append([r['method'], f'{r["loss"]:.4f}', delta, *numbers])
    head = ['method', 'loss (nats/token)', 'minus Top-K', 'mean k', 'expert FLOPs', 'total FLOPs']
    return markdown(head, lines)


def write_log(path, log):
    """A list of dicts as a .csv file, `step` first."""
    names = sorted({name for row in log for name in row}, key=lambda name: (name != 'step', name))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(log)
    write_whole(path, lambda f: f.write(text.getvalue().encode()))


def save_figure(fig, path):
    write_whole(path, lambda f: fig.savefig(f, format='png', dpi=130))
    plt.close(fig)


def training_figure(path, log, top_k, target):
    """Left: loss and price of experts that PPO saves against its start, on a fixed probe. Right: mean k."""
    fig, (a, b) = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    probed = [row for row in log if 'gain' in row]
    steps = [row['step'] for row in probed]
    gain, error = ([0.0] + [1000 * row[name] for row in probed] for name in ('gain', 'gain_se'))
    low, high = ([g + sign * e for g, e in zip(gain, error)] for sign in (-1, 1))
    a.fill_between([0, *steps], low, high, color=SKY, alpha=0.4, linewidth=0, label='one standard error')
    a.plot([0, *steps], gain, color=BLUE, marker='o', markersize=4, label='loss + price of the experts')
    a.axhline(0, color='black', linewidth=0.8, linestyle=':')
    a.set(xlabel='PPO step', ylabel='minus the start (10⁻³ nats/token)', title='what PPO gains on a probe')
    a.legend(fontsize=8)
    every_step, rollouts = [row['step'] for row in log], [row['argmax_k'] for row in log]
    b.plot(every_step, rollouts, color=GREY, linewidth=1, label='rollouts')
    b.plot(steps, [row['probe_k'] for row in probed], color=BLUE, marker='o', markersize=4, label='probe')
    if target:
        b.axhline(target, color='black', linewidth=0.8, linestyle='-.', label='budget')
    b.set(xlabel='PPO step', ylabel='experts per token and layer', title=f'mean k, of K = {top_k}')
    b.legend(fontsize=8)
    save_figure(fig, path)


def layers_figure(path, rows):
    """Mean k by layer of every method."""
    fig, ax = plt.subplots(figsize=(5.6, 3.6), layout='constrained')
    styles = {'top-k': ('black', ':', ''), 'ada-k': (BLUE, '-', 'o'), 'random-mix': (GREY, '--', ''),
              'top-p': (ORANGE, '-', 's'), 'skip': (GREEN, '-', '^')}
    layers = range(1, 1 + len(rows[0]['mean_k_by_layer']))
    for row in rows:
        color, line, marker = styles[row['method']]
        ax.plot(layers, row['mean_k_by_layer'], color=color, linestyle=line, marker=marker,
                label=row['method'])
    ax.set(xlabel='MoE layer', ylabel='mean k (experts per token)', xticks=layers)
    ax.legend(fontsize=8)
    save_figure(fig, path)
