"""Writes docs/methods/: one page a method, from the registry and the notes below.

python docs/generate_methods.py            writes the pages
python docs/generate_methods.py --check    exit code 1 if a page is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlmerge.methods import get_method, method_names
from rlmerge.methods.base import Method, Parameter
from rlmerge.methods.spectral import Spectral
from rlmerge.parameters import expected

FOLDER = Path(__file__).resolve().parent / "methods"

DARE = """
Each coordinate of a delta is kept with the chance `density` and divided by it, so the expected delta is the expert's.
`density: 1`, the default, cuts nothing. RLVR updates are sparse already and often one bf16 step large: dropping
more of them takes capability away, and dividing by a density below 1 makes steps that no expert has seen.

`rescale: l1` gives each tensor its l1 norm back instead, as mergekit does (its `rescale: true`; `false` is `none`). In
large tensors the two agree; in small ones the factor depends on whether a large entry was dropped.

The random number of a coordinate is a hash of (`seed`, method, expert, tensor, coordinate). So a mask is the same on
any machine, and no other model in the recipe changes it.
"""

DELLA = """
A coordinate is kept with a chance that grows with the rank of its magnitude in its row, from `density` − `epsilon` for
the smallest to `density` + `epsilon` for the largest, and divided by that chance. Both ends must lie strictly between 0
and 1; a negative `epsilon` prefers small updates. `density: 1`, the default, cuts nothing.

A row runs along the second dimension; a vector is one row. Equal magnitudes, frequent between bf16 numbers, share the
middle of their ranks. Unchanged coordinates have the lowest ranks, as published: where experts changed few, the changed
ones are kept more often than `density` says. `density_of: support` ranks the changed ones alone.

`rescale: l1` gives each tensor its l1 norm back instead, as mergekit does (its `rescale: true`; `false` is `none`).
"""

BREADCRUMBS = """
Of the n coordinates of a tensor, the int(`gamma`·n) with the largest changes are dropped, the next int(`density`·n)
stay, and the rest is dropped; if both are more than n, fewer outliers go. `density: 1`, the default, cuts nothing, not
even outliers. Ties at a threshold are decided by a hash of the coordinate.

`density_of` says what n is. As published it counts all coordinates: where experts changed few of them, a small
`density` cuts nothing but the largest changes. `support` counts the changed ones.

`rescale: l1` gives each tensor its l1 norm back (mergekit's `rescale: true`); the default is `none`.
"""

WHEN = {
    "arcee_fusion": """
Use it to move one model's most conspicuous changes to the base, with nothing to tune.

A change has the importance |δ| times the divergence (Kullback-Leibler) of its row, read as logits, between model and
base; a row is the last dimension. Changes are taken where the importance reaches the median plus one and a half times
the distance of the quartiles of the tensor; quartiles are exact and count unchanged coordinates. So where
less than a quarter of the coordinates changed, the threshold is 0, and the result is the model.

Probabilities and divergences are fp64 sums of terms that are never negative. In the inputs' dtype, as in mergekit, the
divergence of changes as small as RL's is rounding noise, and so is the choice.
""",
    "breadcrumbs": f"""
Use it where an expert has outliers that do harm. Those of RL experts in bf16 are mostly one step large.
{BREADCRUMBS}""",
    "breadcrumbs_ties": f"""
Use it as `breadcrumbs`, where experts also contradict each other. Those who agree with the elected sign are added up,
or averaged with `normalize: true`. Where weighted deltas cancel exactly, the base stays (`cancelled`).
{BREADCRUMBS}""",
    "nearswap": """
Use it to take from one model what hardly differs from the base, and little of what does.

`t` is absolute, as published: a change up to t is taken, a larger one becomes t. RL changes most weights by less
than 1e-4, so such a t takes nearly all of an RL expert.
""",
    "sce": """
Use it for experts of different strength: those with larger changes count for more, and `select_topk` merges only where
experts differ most.

1. Select: the int(`select_topk`·n) coordinates with the largest variance over the experts, of the n where it is not 0.
   Below 1 this also drops every coordinate on which all experts agree exactly.
2. Coefficients: the mean square of each expert's selected changes, divided by their sum; per tensor.
3. Erase the changes whose sign is not that of the plain sum, and average the others by the coefficients. Where the sum
   is exactly 0 the base stays (`cancelled: positive` elects + as mergekit).

mergekit uses equal coefficients where the mean squares sum to less than 1e-6, hence for every RL expert. There is no
such bound here: deltas a thousand times smaller give a merged delta a thousand times smaller.
""",
    "dare_linear": f"""
Use it to ask how many updates of an expert can be left out.
{DARE}""",
    "dare_ties": f"""
Use it where dense experts contradict each other: dropping by chance thins out what meets before signs are elected.
{DARE}
With `normalize: false`, the default as in mergekit, those who agree are added up; with `true` they are averaged. Where
weighted deltas cancel exactly, the base stays (`cancelled`).
""",
    "della": f"""
Use it as `dare_ties`, where large updates should survive more often than small ones. Those who agree with the elected
sign are averaged (`normalize: false` adds them up). Where weighted deltas cancel exactly, the base stays (`cancelled`).
{DELLA}""",
    "della_linear": f"""
Use it as `dare_linear`, where large updates should survive more often than small ones.
{DELLA}""",
    "iso_c": """
Use it where a few directions of the summed updates drown the others: all become equally strong. RL updates have a few
strong directions and a long tail; Iso-C turns the tail up, noise included. Iso-C is a sum: with many experts lower
`scaling`.
""",
    "iso_cts": """
Use it as `iso_c`, for many or dissimilar experts: a share of the directions is reserved for what each expert has alone.
""",
    "iso_merger": """
Use it for RL experts of one base, whose training turns singular vectors and hardly changes singular values (the
authors' finding: 3 % of an update is in the spectrum). Updates of experts that do not meet are added, not averaged.

Where singular values of the base nearly meet, a small update turns their vectors far. K experts take K + 3
decompositions, and memory grows by a matrix in fp64 with each (two if it is not square), for what an expert's share is
follows from all: look at what `rlmerge check` foresees.
""",
    "karcher": """
Use it for models that were trained apart and differ much: it averages directions and lengths separately, so that the
mean of K models is not shorter than they are.

Experts of one base are nearly parallel (‖δ‖/‖θ‖ of RLVR experts: 1e-5 to 1e-3). There the sphere is flat, and the
result is that of `linear` with equal weights but for one part in ten million. mergekit's `karcher` is something else
there: its angles come from fp32 cosines, which are noise at this size.

A `base_model` that is not among the models is only the reference of the statistics; in mergekit it is one more point.
""",
    "linear": """
Use it as the baseline that every other method must beat.

The average of K experts asks for 1/K of each update. Updates of RLVR experts are often one step between neighbouring
bf16 numbers, so the average falls between two stored numbers and is rounded, often back to the base. Look at
`survival`, or write `out_dtype: float32`.

`base_model` may be given. Then it is only the reference for the statistics and the donor of the small files; it has no
weight in the average unless it is also listed under `models`. Without it, the first model lends names and files.
""",
    "model_stock": """
Use it for a few experts of one task that differ by chance (seeds, data order): the more their deltas agree, the closer
the result is to their mean, else to the base.

RLVR experts of different tasks have nearly orthogonal deltas (cosine 0.05): for two of them t is 0.1, so the result is
the base with a tenth of their mean, most of which bf16 rounds away. Look at `survival`.

Negative cosines give negative t, as published; t never makes the update longer than the longest expert's.
""",
    "multislerp": """
Use it with a base as an average of deltas that does not shrink: the mean of K orthogonal deltas has 1/√K of their
length, this one all of it. Where experts meet it counts shared updates once, as `linear` does.

Without a base it averages weights; for experts of one base this is `linear`. The base may also stand among the models:
it is then left out there.
""",
    "nuslerp": """
Use it for two experts, with a base: halfway between orthogonal deltas each keeps 0.71 of its update, where an average
keeps 0.5. With `nuslerp_flatten: false` every row (or, with `nuslerp_row_wise: true`, every column) turns by its own
angle; rows that only one expert changed keep 0.71 of it as well.

Without a base it turns whole weights, as `slerp` does, with weights in place of `t`. Names are mergekit's, where
"row-wise" means vectors along the first dimension of the stored matrix.
""",
    "passthrough": """
Use it to rewrite one model in another dtype, or to scale some of its tensors:

    parameters:
      scale:
        - filter: down_proj
          value: 0.5
        - value: 1
""",
    "fisher": """
Use it as the published baseline among methods that know curvature. Every model needs a `fisher:` folder.

It averages weights, not changes: an expert that left a weight as it was pulls towards the base with all of its Fisher.
Fishers of experts of one base are much alike, so the result is near the plain average, and an update that one of K
experts made keeps about 1/K of its size. Look at `survival`.

F̂ is the Fisher divided by its mean, so the scale of a Fisher means nothing. `floor` is a share of that mean; the
published 1e-6 is absolute and above nearly all Fishers of language models. With `floor: 0`, a coordinate where all
Fishers are 0 takes the average by `weight`. Tensors without a Fisher count as F̂ = 1.
""",
    "ota": """
Use it where experts are dense, to keep only the changes that matter to them. Every model needs a `fisher:` folder;
those from Adam's second moments (`rlmerge fisher --from-adam`) are the published choice.

Of an expert's changes, the share `density` with the largest F̂·δ² stays, counted over the whole model (or per tensor,
`scope: tensor`). Where several experts keep a change, the changes are averaged by F̂^`power`; experts whose change
was masked have no vote. F̂ is the Fisher divided by its mean. The published thresholds are absolute numbers found for
each expert; a density says the same without them.
""",
    "dots": """
Use it for one expert trained by supervision and one by RL: their deltas differ in size by an order of magnitude, and
few entries of either carry most of it. Find the two weights by a sweep: the authors search them in [0.5, 2] each, by
agreement of sampled answers and perplexity.

Of the n coordinates of a tensor the int(`density`·n) with the largest changes stay; `density_of` says whether n counts
all (as published) or the changed ones. Then each delta is multiplied so that its l2 norm over the whole model is what
it was (`norm: model`); `norm: tensor` does so tensor by tensor, `norm: none` leaves it.
""",
    "ram": """
Use it for RL experts whose updates rarely meet: an update that only one expert made is kept whole, so it survives bf16.

Where experts contradict each other, their mean is taken as well: opposite updates shrink or cancel. The published
`epsilon: 1e-5` is absolute and ignores every smaller change; a step between bf16 numbers is smaller than that for
weights below 2⁻⁹. `rlmerge check` says how large that share is for your experts; `epsilon: 0` counts every change.
""",
    "ramplus": """
Use it as `ram`, where experts share much: what an expert changed alone is raised to make up for the averaging of what
it shares.

A unique change is multiplied by 1 + `r`·min(`alpha`, shared/unique), where shared and unique count the expert's changes
over the whole model. The merge report lists the factors. In bf16 a change of one step stays as it is for any factor
below 1.5, so write `out_dtype: float32` to see a difference to `ram`.
""",
    "ramplus_tl": """
Use it to compare with mergekit, whose `ramplus_tl` this is: as `ramplus`, with the ratio of shared to unique changes
counted in each tensor, and defaults that raise unique changes by 2 % at most.
""",
    "regmean": """
Use it to average linear layers by what they do: on the data of each model, the merged layer's outputs are as near as a
linear layer's can be to that model's outputs (in the mean square, layer by layer). Every model needs a `gram:` folder,
made by [`rlmerge gram`](../gram.md).

It is an average: what one of K experts learned in directions that the others' data use, too, keeps about 1/K of its
size, and all of it in directions that nobody else's data use. Look at `survival`.

`alpha` shrinks what is off the diagonals, as published: 0.9 (the authors' choice; 0.1 for T5). `alpha: 0` is a mean
weighted by the mean square of each input; at 1 the matrices of few data decide directions that they hardly saw. Gram
matrices are means over positions, so a model with more data counts no more; `weight` says that it should.

What has no Gram matrix in every model takes the mean by `weight`: norms, biases, embeddings, a head that is tied to the
embedding, and whatever the filters of `matrix` leave out. Inputs that are 0 in all data do the same. A model whose
data never reach a layer (an expert of a mixture) has no say in it. Without a base it works alike, on the weights.

The equation is solved in fp64 by Cholesky factors, for differences to the first expert: experts that agree come back
bit for bit, and so does a row of weights (a neuron) that none of them changed. A tensor takes about
((K + 2)·in²·out + in³/3) / 3e10 seconds of a thread, and 3·in² + 7·in·out numbers in fp64; `rlmerge check` foresees
both, `--memory` bounds the threads by it. BLAS libraries round differently, so the same bytes are promised for one
machine only.
""",
    "resmerge": """
Use it where the strongest direction of each expert contradicts the others and their tails agree. Between nearly
orthogonal RL experts, the tails' coherence is 1/√K: then it is the mean of the tails, and little of it survives bf16.
Look at `survival`.
""",
    "sar": """
Use it for RLVR experts of one base whose updates are sparse and contradict each other. With Fishers, the expert for
whom a weight matters most keeps its update; without them, `sensitivity: delta2` lets the larger update win.

## Our reading

The public text of the paper names three stages and their order, not their equations. Each stage is here a choice with
a name and a default. d = w·δ is an expert's weighted delta, F̂ its Fisher divided by the Fisher's mean, s its
sensitivity, K the number of experts. A coordinate is *unique* if one expert changed it; where several did, it is in
*conflict* if their d differ in sign, else in *agreement*.

**1. Resolve.** It gives each expert a share r of its update; t = r·d. A unique update has the share 1.

In a conflict, by `arbitration`:

- `winner`: T is the set of experts with the largest s and, among them, the largest |d|. If the signs within T agree, T
  shares the update equally and all others get 0. If not, it is a draw: the coordinate returns to the base.
- `soft`: shares (s / max s)^`power`, normalised.
- `elect`: the sign with the larger sum of s wins; those who have it are combined by the agreement rule.
- `margin`: as `winner` where the largest s is at least `margin` times the second; elsewhere as `soft`.
- `random`: one expert by a hash of the coordinate. A control.

`allies` says what becomes, for K ≥ 3, of the others that have the winner's sign: `drop`, or `join` by the agreement
rule.

In an agreement, by `agreement`: `sensitivity_mean` (Σ s·d / Σ s; the mean where all s are zero), `mean`, `winner`,
`sum`, or `multiplicity` (between sum and mean: a pair of experts that conflicts less over the model shares more).

`sensitivity` is `fisher_delta2` (F̂·d²), `fisher` (F̂) or `delta2` (d²). All experts have a Fisher, or none.

**2. Sparsify.** Per expert, over the n coordinates where t ≠ 0, k = max(1, int(`density`·n)) are kept.

- `magnitude`, ranked by `score`: `delta` (|d|, before shares), `share` (|t|), or `merged` (|Σ t|, decided once for all
  experts).
- `magprune`: each is kept with a probability that grows linearly with its rank, from density − ε to density + ε.
- `fisher_magnitude`: ranked by |d|·√F̂.
- `none`.

Only tensors with at least two dimensions larger than 1 are sparsified. Ties at the threshold are decided by a hash of
the coordinate; tensors of up to 2²⁰ coordinates keep exactly k.

**3. Rescale.** Per expert, g = norm of t before / norm after the cut, at most `rescale_max`. (In tensors of more than
2²⁰ coordinates, a class of 2¹⁴ ties or more counts in the norm after the cut by the share of it that stays: the
histograms of stage 2 know that, and a pass is saved. The factor differs by less than 1 % of that class's part.) With
`inverse_probability` (only with `magprune`) each kept update is divided by its probability.

Then θ = θ0 + λ·Σ g·t. A coordinate whose one share is 1, with λ·g·w = 1, takes the stored value of that expert.
See [decision 0005](../decisions/0005-sar-as-we-read-it.md).
""",
    "slerp": """
Use it between two models that differ much. Between experts of one base the angle is so small that the result is the
straight line, `linear` with weights 1 - t and t; `nuslerp` with a base turns the deltas instead.

`models` lists both ends, or one of them and `base_model` the other. `t` may be a gradient over the layers and have
filters: mergekit's well-known recipes have one curve for `self_attn` and one for `mlp`.
""",
    "subspace_rewiring": """
Use it on one expert, to see how few directions of its update carry it, or to drop what is outside the base's leading
directions (`base_rank`). By default a square matrix is only cut: all its directions are those of the base.

The method's authors call it SAR, too; it is not `sar`. Save it wider than bf16: what remains of the update is small.
""",
    "task_arithmetic": """
Use it where experts hardly meet, or with a small `lambda` found by a sweep. The sum keeps unique updates whole, so they
survive bf16; shared updates are counted once per expert, and opposite ones cancel.
""",
    "ties": """
Use it as the established baseline for conflicts: the sign with the larger weighted sum wins, and those who have it are
averaged.

`density` is a share of all coordinates, as published. RLVR experts change few, so a density above their support
cuts nothing; `density_of: support` makes it a share of the non-zero updates.

Updates of equal size and opposite sign cancel exactly, which is common between bf16 RLVR experts. Then nobody is
elected and the base stays. mergekit elects + there: `cancelled: positive` does the same.
""",
    "tsv_m": """
Use it for experts whose updates have low rank. Each keeps r/K directions, so K experts share the matrix; directions
that two experts share are turned apart, and not counted twice. A LoRA has no more directions than
its rank. It is a sum: `scaling` up to 3 was tried by the authors.
""",
}

LAWS = {
    "permutation": "the order of the models changes nothing",
    "scaling": "deltas twice as large make a merged delta twice as large",
    "identity": "one expert alone, with weight 1 and nothing cut, gives that expert",
    "sign": "deltas of opposite sign make a merged delta of opposite sign",
    "zero": "experts equal to the base give the base",
}

MATRICES = [
    "2-D tensors are decomposed whole, in fp64, with one thread of BLAS each; directions of rounding noise are "
    "dropped. A decomposition of m×n takes about 4e-10 s·m·n·min(m, n), and a merge of three models 2 to 7 times a "
    "matrix in fp64. `rlmerge check` foresees both, the memory for the worst of spectra; `--memory` bounds the threads "
    "by it. BLAS libraries round differently, so the same bytes are promised for one machine only.",
    "",
]


def page(method: Method) -> str:
    """The Markdown page of one method."""
    if method.name not in WHEN:
        raise SystemExit(f"docs/generate_methods.py: write in WHEN when to use {method.name!r}")
    low, high = method.arity.minimum, method.arity.maximum
    models = f"at least {low}" if high is None else str(low) if low == high else f"{low} to {high}"
    lines = [
        "<!-- Written by docs/generate_methods.py from the registry; edit that file, not this page. -->",
        "",
        f"# {method.name}",
        "",
        f"{method.summary[0].upper()}{method.summary[1:]}.",
        "",
        f"    {method.formula}",
        "",
        f"Source: {method.source}. Base model: {method.arity.base}. Experts: {models}.",
        "",
        "## When to use it",
        "",
        WHEN[method.name].strip(),
        "",
        "## Parameters",
        "",
        "| name | value | default | where | meaning |",
        "|---|---|---|---|---|",
        *(row(spec) for spec in method.parameters),
        "",
        *MATRICES * isinstance(method, Spectral),
        "Numbers may be gradients over the layers, and every parameter may have filters: see [the guide](../guide.md).",
        "",
    ]
    if method.laws:
        lines += ["## Laws", "", "The method declares these, at its default parameters:", ""]
        lines += [f"- {law}: {LAWS[law]}" for law in sorted(method.laws)]
        lines += [""]
    return "\n".join(lines)


def row(spec: Parameter) -> str:
    """One parameter as a row of the table."""
    words = ", ".join(f"`{choice}`" for choice in spec.choices) if spec.kind == "choice" else expected(spec)
    if spec.flags:
        words += f"; `true` is `{spec.flags[0]}`, `false` `{spec.flags[1]}`"
    default = {None: "required", True: "`true`", False: "`false`"}.get(spec.default, f"`{spec.default}`")  # type: ignore[arg-type]
    if isinstance(spec.default, (int, float)) and not isinstance(spec.default, bool):
        default = f"`{spec.default:g}`"
    where = "model or global" if spec.per_model else "global"
    cells = (f"`{spec.name}`", words, default, where, spec.doc)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def index() -> str:
    """The page that lists the methods."""
    lines = [
        "<!-- Written by docs/generate_methods.py from the registry; edit that file, not this page. -->",
        "",
        "# Methods",
        "",
        "θ0 is the base, θi an expert, δi = θi − θ0 its delta, wi its weight, λ the parameter `lambda`.",
        "",
        "| method | what it does | base model |",
        "|---|---|---|",
    ]
    lines += [f"| [{m.name}]({m.name}.md) | {m.summary} | {m.arity.base} |" for m in map(get_method, method_names())]
    return "\n".join([*lines, ""])


def pages() -> dict[str, str]:
    """Every page by its file name."""
    return {"index.md": index()} | {f"{name}.md": page(get_method(name)) for name in method_names()}


def main() -> int:
    """Writes or checks the pages."""
    made = pages()
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    if "--check" in sys.argv[1:]:
        stale = sorted(name for name in made.keys() | found.keys() if made.get(name) != found.get(name))
        if stale:
            print(f"not up to date: {', '.join(stale)}. Run: python docs/generate_methods.py", file=sys.stderr)
        return int(bool(stale))
    FOLDER.mkdir(exist_ok=True)
    for name in found.keys() - made.keys():
        (FOLDER / name).unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
