"""run/report.py: what a run shows: Markdown tables, log.csv, figures.

Colours survive colour-blindness; lines and markers differ too, for greyscale.
"""
import csv
import io
import os

from hub.files import write_text, write_whole

os.environ['MPLBACKEND'] = 'agg'        # figures go to files; the backend of a notebook may not exist here
import matplotlib.pyplot as plt  # noqa: E402

FEW_DOCUMENTS = 10      # fewer say little about how documents differ

plt.style.use('tableau-colorblind10')
plt.rcParams.update({'figure.constrained_layout.use': True, 'axes.grid': True})


def markdown(head, lines):
    """A Markdown table of strings."""
    rule = ['---'] * len(head)
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (head, rule, *lines))


def table(rows):
    """The rows of results.json as a Markdown table."""
    lines = []
    for r in rows:
        delta = f'{r["delta"]:+.4f} ± {r["delta_se"]:.4f}'
        cost = [f'{r[name]:.3f}' for name in ('mean_k', 'expert_flops', 'total_flops')]
        lines.append([r['method'], f'{r["loss"]:.4f}', delta if r['method'] != 'top-k' else '', *cost])
    head = ['method', 'loss (nats/token)', 'minus top-k', 'mean k', 'expert FLOPs', 'total FLOPs']
    return markdown(head, lines)


def tell(results):
    """Print what a run says at its end, of results.json."""
    documents = results['effective_documents']
    print(table(results['rows']))
    if documents < FEW_DOCUMENTS:
        print(f'errors are rough: the held-out text counts as {documents:.1f} equally long documents')
    print(f'base model: {results["bits_per_byte"]:.3f} bits per byte on held-out text')
    print(f'{sum(results["seconds"].values()):.0f} s')


def write_log(path, log):
    """A list of dicts as a .csv file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, log[-1])
    writer.writeheader()
    writer.writerows(log)
    write_text(path, text.getvalue())


def save_figure(fig, path):
    write_whole(path, lambda f: fig.savefig(f, format='png', dpi=130))
    plt.close(fig)


def training_figure(path, log, top_k, target):
    """Left: the mean reward of the rollouts (eq. 6). Right: the mean of the most probable k."""
    fig, (a, b) = plt.subplots(1, 2, figsize=(9, 3.4))
    steps = [row['step'] for row in log]
    a.plot(steps, [row['reward'] for row in log])
    a.set(xlabel='PPO step', ylabel='nats per token', title='reward of the rollouts')
    b.plot(steps, [row['argmax_k'] for row in log])
    if target:
        b.axhline(target, color='black', linestyle=':')                     # the budget
    b.set(
        xlabel='PPO step',
        ylabel='experts per token and layer',
        title=f'mean k of the rollouts, of K = {top_k}',
    )
    save_figure(fig, path)
