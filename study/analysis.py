"""study/analysis.py: where the trained allocators spend experts on held-out text ->
RUN/analysis/analysis.json, .png.

    python -m study.analysis out/deep        the findings, each published claim with whether it holds here
"""
import numpy as np
import torch

from allocator import AdaK, Counted, TopK
from hub.files import InputError, write_json
from moe_dispatch import used
from run.console import one_line_errors
from run.evaluate import evaluate
from run.ranks import ranks
from run.report import BLUE, GREY, plt, save_figure
from study.classes import held_out_classes
from study.passage import draw_passage, mean_k_of
from study.study import open_study, parse


class Loads(Counted):
    """A counted policy that keeps every k, and how often each expert ran: `load` (L,N)."""

    def __init__(self, policy, n_layers, n_experts, device):
        super().__init__(policy, n_layers, device)
        self.load = torch.zeros(n_layers, n_experts, device=device)
        self.kept = [[] for _ in range(n_layers)]

    def count(self, layer, x, probs, k):
        super().count(layer, x, probs, k)
        self.kept[layer].append(k.cpu())
        ids = probs.topk(self.k_max, dim=-1).indices                        # (P,k_max)
        ran = ids[used(k, self.k_max)]                                      # (sum(k),)
        self.load[layer] += torch.bincount(ran, minlength=probs.shape[1])

    def k(self):
        """(L,n) of the n tokens so far."""
        return torch.stack([torch.cat(parts) for parts in self.kept])

    def busiest_first(self):
        """The share of the rows that each expert of a layer takes, in falling order: (L,N) as lists."""
        share = self.load / self.load.sum(1, keepdim=True)
        return share.sort(1, descending=True).values.cpu().tolist()


def analysis(a):
    """Measure, then print the findings and draw the figure."""
    study = open_study(a, 'analysis')
    s, c, model = study.s, study.model.config, study.model
    policy = AdaK.of_run(a.run, c, s.device)
    topk, ada = (Loads(p, study.L, c.n_experts, s.device) for p in (TopK(c.top_k), policy))
    loss, _ = evaluate(model, study.windows, topk)
    evaluate(model, study.windows, ada)
    k = ada.k().float()                                                     # (L,n)
    kind, names = held_out_classes(study)
    sample = loss[::max(1, len(loss) // 10 ** 6)]                           # quantile takes no more
    tenth = torch.searchsorted(torch.quantile(sample, torch.linspace(0.1, 0.9, 9).double()), loss)

    def group(of, n):
        return [k[:, of == i].mean().item() if (of == i).any() else None for i in range(n)]
    results = {
        'K': c.top_k, 'mean_k': k.mean().item(), 'above_k': (k > c.top_k).float().mean().item(),
        'histogram': [(k == i).float().mean().item() for i in range(1, policy.k_max + 1)],
        'by_layer': k.mean(1).tolist(), 'classes': names, 'by_class': group(kind, len(names)),
        'class_share': [(kind == i).float().mean().item() for i in range(len(names))],
        'by_difficulty': group(tenth, 10),
        'load': {'Top-K': topk.busiest_first(), 'Ada-K': ada.busiest_first()},
        'passage': passage(study, policy)}
    write_json(study.folder / 'analysis.json', results)
    analysis_figure(study.folder / 'analysis.png', results)
    print(findings(results))
    print(f'wrote analysis.json and analysis.png in {study.folder}')


def passage(study, policy):
    """[(text of a token, its mean k), ..] of the first held-out window of one document, ASCII, prose-like.

    Prose-like: more than half of the characters are letters. The first window where there is none such.
    """
    inputs, _, documents = study.windows
    chosen = 0
    for i, document in enumerate(documents):
        text = study.tokenizer.decode(inputs[i].tolist())
        letters = sum(map(str.isalpha, text))
        whole = document[0] == document[-1] and text.isascii()
        if whole and letters > len(text) / 2 and text.count('\n') > 5:
            chosen = i
            break
    tokens = inputs[chosen:chosen + 1]
    k = mean_k_of(study.model, tokens.to(study.s.device), policy).tolist()
    return list(zip(study.tokenizer.stream(tokens[0].tolist()), k))


def findings(r):
    """The analysis in sentences, each published claim with whether it holds here."""
    def verdict(holds):
        return 'holds here' if holds else 'does not hold here'

    def listed(numbers):
        return ', '.join(f'{n:.2f}' for n in numbers)
    layers, by_class, tenths = r['by_layer'], dict(zip(r['classes'], r['by_class'])), r['by_difficulty']
    inner, ends = np.mean(layers[1:-1] or layers), (layers[0] + layers[-1]) / 2
    words = 'identifier' if 'identifier' in by_class else 'content word'
    seen = sorted(((k, name) for name, k in by_class.items() if k is not None), reverse=True)
    rising = np.corrcoef(range(10), tenths)[0, 1]
    busiest = {name: np.mean([layer[0] for layer in load]) for name, load in r['load'].items()}
    shares = ', '.join(f'{i} for {share:.0%}' for i, share in enumerate(r['histogram'], 1) if share >= 0.005)
    middle_more = inner > max(layers[0], layers[-1])
    words_more = by_class[words] > by_class['operator, punctuation']
    return '\n'.join([
        f'- **How many.** Mean k {r["mean_k"]:.2f} of K = {r["K"]}; k = {shares} of the decisions; '
        f'{r["above_k"]:.1%} use more than K (published: about 10% of tokens).',
        f'- **Middle layers use more** {verdict(middle_more)}: mean k by layer {listed(layers)} '
        f'(middle {inner:.2f}, first and last {ends:.2f}).',
        f'- **Content words use more** {verdict(words_more)}: '
        + ', '.join(f'{name} {k:.2f}' for k, name in seen) + '.',
        f'- **Harder tokens use more** {verdict(rising > 0.5)}: mean k by tenth of the loss under Top-K, '
        f'easiest first, {listed(tenths)} (correlation of tenth and mean k {rising:+.2f}).',
        f'- **Expert load.** The busiest expert of a layer takes {busiest["Top-K"]:.1%} of the rows under '
        f'Top-K and {busiest["Ada-K"]:.1%} under Ada-K (even: {1 / len(r["load"]["Top-K"][0]):.1%}).'])


def analysis_figure(path, r):
    """Six panels: how many, by layer, by class, by difficulty, expert load, a passage."""
    fig, axes = plt.subplots(2, 3, figsize=(13, 6.8), layout='constrained')
    (a, b, c), (d, e, f) = axes
    a.bar(range(1, len(r['histogram']) + 1), r['histogram'], color=BLUE)
    a.axvline(r['K'], color='black', linestyle=':', label='Top-K')
    a.set(xlabel='k (experts)', ylabel='share of decisions', title='how many experts')
    a.legend(fontsize=8)
    layers = range(1, len(r['by_layer']) + 1)
    b.plot(layers, r['by_layer'], color=BLUE, marker='o')
    b.set(xlabel='MoE layer', ylabel='mean k', title='by layer', xticks=layers)
    rows = zip(r['classes'], r['by_class'], r['class_share'])
    names, means = zip(*((f'{name} ({share:.0%})', k) for name, k, share in rows if k is not None))
    c.barh(names[::-1], means[::-1], color=BLUE)
    c.axvline(r['mean_k'], color='black', linestyle='--', label='mean')
    c.set(xlabel='mean k', title='by class of the token (share)', xlim=(0.9 * min(means), None))
    c.legend(fontsize=8, loc='lower right')
    d.plot(range(1, 11), r['by_difficulty'], color=BLUE, marker='o')
    d.set(xlabel='tenth of the loss under Top-K (10: hardest)', ylabel='mean k', title='by difficulty',
          xticks=range(1, 11))
    for name, color, line in (('Top-K', GREY, '--'), ('Ada-K', BLUE, '-')):
        mean = np.mean(r['load'][name], axis=0)
        e.plot(range(1, len(mean) + 1), mean, color=color, linestyle=line, label=name)
    e.set(xlabel='expert, busiest first', ylabel='share of rows, mean over layers', title='expert load',
          ylim=(0, None))
    e.legend(fontsize=8)
    draw_passage(f, r['passage'])
    save_figure(fig, path)


def main(argv=None):
    a = parse(argv, __doc__)
    if not a.run:
        raise InputError('give the folder of a run: its allocators are what is looked at')
    if ranks()[1] > 1:
        raise InputError('the analysis is for one process: run it without torchrun')
    analysis(a)


if __name__ == '__main__':
    one_line_errors('study.analysis', main)
