"""study/analysis.py: where the trained allocators spend experts on held-out text, beside the paper's claims.

    python -m study.analysis out/deep     -> RUN/analysis/analysis.json, .png, and the findings in sentences
"""
import re
from keyword import kwlist

import numpy as np

from allocator import Watched
from hub.files import write_json
from run import standins
from run.console import one_line_errors
from run.evaluate import evaluate
from run.report import plt, save_figure
from run.state import trained_policy
from study.study import open_study, parser

CLASSES = 'function word', 'content word', 'number', 'white space', 'operator, punctuation'
# runs of like bytes, a group for each class but the first; what is not ASCII counts as letters
RUNS = re.compile(rb'([a-zA-Z\x80-\xff]+)|(\d+)|(\s+)|(.)')
# Python's keywords are function words too
FUNCTION_WORDS = set(
    f'{" ".join(kwlist)} '
    'a an the and or but nor so yet if then than that this these those of to in on at by for from with '
    'without as is are was were be been being it its he she they we you i him her them us me my your his our '
    'their not no do does did has have had will would can could may might must shall should there which who '
    'whom what when where'.lower().encode().split())


# ================================================================ classes of tokens

def token_classes(tokenizer, ids):
    """Yield the class of each token: that of its first character that is not white space, if it has one.

    bos and eos are white space. The text is what the tokens spell, which may be a normalised form of what the
    tokenizer was given.
    """
    pieces = [b'\n' if i in tokenizer.marks else tokenizer.bytes_of_id[i] for i in ids]
    of_byte = []
    for match in RUNS.finditer(b''.join(pieces)):
        run = match[0]
        function = run.lower() in FUNCTION_WORDS
        of_byte += [CLASSES[0 if function else match.lastindex]] * len(run)
    end = 0
    for piece in pieces:
        word = piece.lstrip() or piece
        end += len(piece)
        yield of_byte[end - len(word)]


# ================================================================ what is measured

def analyse(study, policy):
    """What analysis.json holds. Of a word that a window cuts, the part within decides its class."""
    by_layer = [[] for _ in range(study.families.L)]
    watched = Watched(policy, lambda layer, x, probs, k: by_layer[layer].append(k.cpu()))
    evaluate(study.model, study.windows, [watched])
    k = np.stack([np.concatenate(parts) for parts in by_layer])             # (L,n)
    of_token = k.mean(0)
    classes = np.concatenate([
        list(token_classes(study.tokenizer, ids))
        for ids in study.windows[0].tolist()
    ])                                                                      # (n,)
    easiest_first = of_token[study.of_topk.argsort(kind='stable')]
    return {
        'K': study.families.K,
        'mean_k': k.mean(),
        'histogram': [(k == i).mean() for i in range(1, policy.k_max + 1)],
        'by_layer': k.mean(1).tolist(),
        'by_class': {name: of_token[classes == name].mean() for name in sorted(set(classes))},
        'by_difficulty': [tenth.mean() for tenth in np.array_split(easiest_first, 10)],
    }


# ================================================================ findings and figure

def listed(numbers):
    return ', '.join(f'{n:.2f}' for n in numbers)


def findings(r):
    """The analysis in sentences: each published claim, and whether it holds here.

    That of the classes is left out where the text lacks one of them.
    """
    K = r['K']
    layers = r['by_layer']
    by_class = r['by_class']
    shares = [f'{k} for {share:.0%}' for k, share in enumerate(r['histogram'], 1) if share >= 0.005]
    middle = np.mean(layers[1:-1] or layers)
    rising = np.corrcoef(range(10), r['by_difficulty'])[0, 1]
    claims = [
        (
            'About a tenth of the tokens use more than K',
            sum(r['histogram'][K:]) > 0.05,
            f'mean k {r["mean_k"]:.2f} of K = {K}, k = {", ".join(shares)} of the decisions',
        ),
        (
            'Middle layers use more',
            middle > max(layers[0], layers[-1]),
            f'mean k by layer {listed(layers)}',
        ),
        (
            'Harder tokens use more',
            rising > 0.5,
            f'mean k by tenth of the loss under top-k, easiest first, {listed(r["by_difficulty"])} '
            f'(correlation of tenth and mean k {rising:+.2f})',
        ),
    ]
    if len(by_class) >= len(CLASSES):
        most_first = sorted(by_class, key=by_class.get, reverse=True)
        of_class = ', '.join(f'{name} {by_class[name]:.2f}' for name in most_first)
        claims.append(('Content words use more', most_first[0] == 'content word', of_class))
    return '\n'.join(
        f'- **{claim}** {"holds" if holds else "does not hold"} here: {numbers}.'
        for claim, holds, numbers in claims
    )


def analysis_figure(path, r):
    """Three panels: mean k by layer, by class, by difficulty."""
    panels = {
        'MoE layer': enumerate(r['by_layer'], 1),
        'class of the token': r['by_class'].items(),
        'tenth of the loss (10: hardest)': enumerate(r['by_difficulty'], 1),
    }
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for ax, (title, points) in zip(axes, panels.items()):
        place, mean_k = zip(*points)
        ax.plot(mean_k, place, 'o')
        ax.set(title=title, xlabel='mean k')
    save_figure(fig, path)


def main(argv):
    a = parser(__doc__).parse_args(argv)
    study = open_study(a, 'analysis')
    policy = trained_policy(a.run, study.model.config, study.digest)
    standins.use(study.model, policy.fitted)
    results = analyse(study, policy)
    write_json(study.folder / 'analysis.json', results)
    analysis_figure(study.folder / 'analysis.png', results)
    print(findings(results))
    print(f'wrote {study.folder}')


if __name__ == '__main__':
    one_line_errors('study.analysis', main)
