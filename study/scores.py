"""study/scores.py: log-probabilities of continuations, and texts up to a stop string, for many requests."""
import torch
import torch.nn.functional as F

from allocator import Counted
from model import generate_steps
from run.console import Progress
from run.ranks import gathered, ranks
from scale.memory import LOGITS


class Tally(Counted):
    """A counted policy of real tokens; `lengths` has the number of them in each sequence that ran."""

    def __init__(self, policy, n_layers, device):
        super().__init__(policy, n_layers, device)
        self.lengths = []


class RealOnly:
    """A tally's policy for one batch: padding, and rows that have ended, run one expert and do not count.

    real (B*T,) bool, or (B,) for all tokens of a row; it may change in place between passes.
    """

    def __init__(self, tally, real):
        self.tally, self.real, self.k_max = tally, real, tally.k_max

    def __call__(self, layer, x, probs):
        real = self.real.repeat_interleave(len(x) // len(self.real))        # (P,)
        k = self.tally.policy(layer, x, probs)
        self.tally.counts[layer].scatter_add_(0, k, real.long())
        return torch.where(real, k, 1)


@torch.no_grad()
def score(model, requests, tally, batch=8192, stage='score'):
    """[(log p of the continuation in nats, is it what greedy decoding gives?), ..] of requests.

    requests: [(context ids, continuation ids), ..], neither empty. Too long a context loses its left end,
    down to one token. A pass has at most `batch` tokens with padding, or one sequence; requests with the same
    input, such as choices of one token, share its pass. Ranks share the inputs.
    """
    (rank, size), own = ranks(), Tally(tally.policy, len(tally.counts), model.device)
    askers, longest = {}, model.config.max_len                 # input -> the requests that read it
    for i, (context, continuation) in enumerate(requests):
        inputs = (context + continuation)[:-1][-max(longest, len(continuation)):]
        askers.setdefault(tuple(inputs), []).append(i)
    by_length = sorted(askers, key=len, reverse=True)[rank::size]       # neighbours in length: little padding
    logp, greedy = torch.zeros(len(requests), dtype=torch.double), torch.ones(len(requests), dtype=torch.bool)
    done, progress = 0, Progress(stage, len(requests))
    visits = visits_of(by_length, batch, model.tokens_per_visit)
    for batches in visits:
        for inputs, hidden in zip(batches, hidden_states(model, batches, own)):
            # every token to predict: its row, the place that predicts it, its id, its request
            wanted = [(b, len(ids) - len(requests[i][1]) + j, token, i) for b, ids in enumerate(inputs)
                      for i in askers[ids] for j, token in enumerate(requests[i][1])]
            for part in torch.tensor(wanted).split(max(1, LOGITS // model.config.n_vocab)):
                (b, place, y), i = part[:, :3].T.to(model.device), part[:, 3]               # (n,) each
                logits = model.lm_head(hidden[b, place]).float()                            # (n,V)
                logp.index_add_(0, i, -F.cross_entropy(logits, y, reduction='none').cpu().double())
                greedy[i[(logits.argmax(-1) != y).cpu()]] = False
            done += size * sum(len(askers[ids]) for ids in inputs)
            progress(min(done, len(requests)), size * sum(own.lengths), mean_k=own.mean())
    for _ in range(max(gathered(len(visits))) - len(visits)):  # every rank visits the layers as often
        model.hidden(torch.zeros(1, 1, dtype=torch.long, device=model.device))
    parts = gathered((logp, greedy, own.counts.cpu(), own.lengths))
    for _, _, counts, lengths in parts:
        tally.counts += counts.to(model.device)
        tally.lengths += lengths
    logp = sum(part[0] for part in parts)
    greedy = torch.stack([part[1] for part in parts]).all(0)
    return list(zip(logp.tolist(), greedy.tolist()))


def visits_of(by_length, batch, tokens_per_visit):
    """[[[inputs of a pass], .. passes of a visit of the layers], ..]; at most `batch` tokens a pass."""
    visits, tokens = [], tokens_per_visit
    while by_length:
        longest = len(by_length[0])
        n = max(1, batch // longest)
        inputs, by_length = by_length[:n], by_length[n:]
        if tokens >= tokens_per_visit:
            visits.append([])
            tokens = 0
        visits[-1].append(inputs)
        tokens += len(inputs) * longest
    return visits


def hidden_states(model, batches, tally):
    """The hidden states (B,T,C) of each batch, B tuples of ids, longest first; padded on the right."""
    passes = []
    for inputs in batches:
        lengths = [len(ids) for ids in inputs]
        T = lengths[0]
        tokens = torch.tensor([ids + (0,) * (T - len(ids)) for ids in inputs])              # (B,T)
        real = torch.arange(T) < torch.tensor(lengths)[:, None]                             # (B,T)
        tally.lengths += lengths
        passes.append((tokens.to(model.device), RealOnly(tally, real.flatten().to(model.device))))
    return model.hidden_of(passes)


@torch.no_grad()
def write_until(model, tokenizer, prompts, stops, n, temperature, tally, generator):
    """The texts behind B prompts of one length, at most n tokens each, up to eos or the first stop string.

    stops: B lists. A stop string is looked for in the bytes of the text so far: it may begin and end inside
    tokens.
    """
    raw, steps, going = [b''] * len(prompts), [0] * len(prompts), [True] * len(prompts)
    running = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    tokens, policy = torch.tensor(prompts, device=model.device), RealOnly(tally, running)
    for new in generate_steps(model, tokens, n, policy, temperature, generator):
        for b, token in enumerate(new.flatten().tolist()):
            if not going[b]:
                continue
            steps[b] += 1
            if token in tokenizer.stops:
                going[b] = False
                continue
            raw[b] += tokenizer.bytes_of_id.get(token, b'')
            ends = [raw[b].find(stop.encode()) for stop in stops[b] if stop.encode() in raw[b]]
            if ends:
                raw[b], going[b] = raw[b][:min(ends)], False
        running.copy_(torch.tensor(going))                     # in place: a CUDA graph may hold it
        if not any(going):
            break
    # the last token of a text is not run
    tally.lengths += [len(ids) + m - 1 for ids, m in zip(prompts, steps)]
    texts = [text.decode('utf-8', errors='replace') for text in raw]
    return [text.removeprefix(' ') if tokenizer.drops_space else text for text in texts]     # as decode
