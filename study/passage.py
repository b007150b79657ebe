"""study/passage.py: text on backgrounds that say how many experts each token ran, in a terminal or figure."""
import torch

from allocator import Watched
from run.report import plt

# backgrounds from few experts to many; they differ in lightness too, so greyscale works
TERMINAL = 17, 24, 66, 144, 221                 # of 256 colours, dark blue to yellow
FIGURE = '#00224e', '#3f4d6c', '#7c7b78', '#bcae6c', '#fee838'
LINES, COLUMNS = 13, 52                         # of the figure


@torch.no_grad()
def mean_k_of(model, tokens, policy):
    """The mean k over the MoE layers of every token, (T,) float, in one pass of tokens (1,T)."""
    seen = []
    model.hidden(tokens, Watched(policy, lambda layer, x, probs, k: seen.append(k)))
    return torch.stack(seen).float().mean(0).cpu()                          # (L,T) -> (T,)


class Scale:
    """Five equal steps between the least and the largest value."""

    def __init__(self, values):
        self.low, self.steps = min(values), len(TERMINAL)
        self.width = (max(values) - self.low) / self.steps or 1

    def step(self, value):
        return min(int((value - self.low) / self.width), self.steps - 1)

    def labels(self):
        ends = [self.low + i * self.width for i in range(self.steps + 1)]
        return [f'{a:.2f}-{b:.2f}' for a, b in zip(ends, ends[1:])]


def coloured(model, tokenizer, tokens, policy):
    """For a terminal: the text of tokens (1,T), each on a background by its mean k, and a legend."""
    k = mean_k_of(model, tokens, policy).tolist()
    scale = Scale(k)

    def paint(step, text):
        return f'\x1b[48;5;{TERMINAL[step]}m\x1b[38;5;{231 if step < 3 else 16}m{text}\x1b[0m'
    pieces = zip(k, tokenizer.stream(tokens[0].tolist()))
    body = ''.join(paint(scale.step(k_t), piece).replace('\n', '\x1b[0m\n') for k_t, piece in pieces)
    legend = ' '.join(paint(step, f' {label} ') for step, label in enumerate(scale.labels()))
    return f'{body}\nmean k over the layers: {legend}'


def draw_passage(ax, passage):
    """The same in a figure: passage [(text of a token, mean k), ..] in fixed width, a legend under it."""
    scale = Scale([k for _, k in passage])
    ax.set(xlim=(0, COLUMNS), ylim=(LINES + 2, 0), title='a held-out passage, by mean k')
    ax.set_axis_off()
    line = column = 0
    for text, k in passage:
        step = scale.step(k)
        for character in text:
            if character == '\n' or column == COLUMNS:
                line, column = line + 1, 0
            if line == LINES:
                break
            if character != '\n':
                put(ax, column, line, character, step)
                column += 1
    for step, label in enumerate(scale.labels()):
        for i, character in enumerate(label.center(10)):
            put(ax, step * 10 + i, LINES + 1, character, step)


def put(ax, column, line, character, step):
    """One character on its background."""
    ax.add_patch(plt.Rectangle((column, line), 1, 1, color=FIGURE[step], linewidth=0))
    ax.text(column + 0.5, line + 0.55, character, family='monospace', fontsize=6.5, ha='center', va='center',
            color='white' if step < 3 else 'black')
