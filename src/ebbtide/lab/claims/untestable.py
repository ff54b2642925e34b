"""Claims that no experiment of minutes on a small machine can decide, and why."""

from __future__ import annotations

from ebbtide.lab.claims.claim import Claim, Verdict

__all__ = ["CLAIMS"]


def _untestable(name: str, title: str, claim: str, source: str, why: str, known: str) -> Claim:
    return Claim(
        name=name,
        title=title,
        claim=claim,
        source=source,
        experiment="None.",
        prediction=known,
        expected=Verdict.UNTESTABLE,
        rule=why,
    )


CLAIMS = (
    _untestable(
        "imagenet",
        "ImageNet accuracy rises by 0.5 to 1.5 %",
        "AdamW in place of Adam raises ImageNet accuracy by 0.5 to 1.5 points.",
        "Introductory texts on AdamW, without a reference",
        "It takes ImageNet and weeks of GPU time. The claim accuracy tests the mechanism on "
        "digits, which is no reproduction.",
        "Published gaps run from none, for tuned convolutional nets with batch normalisation, to "
        "about 4 points: ResNet-18 with Adam 63.79 (66.54 retuned), with AdamW 67.93. Much of it "
        "is the size of λ: ResNeXt-50 under decoupled Adam goes from 71.7 to 76.9 when λ goes "
        "from 1e-4 to 1e-1 (tables in the repositories of AdaBelief and Apollo).",
    ),
    _untestable(
        "fifteen-percent",
        "A test error 15 % lower on CIFAR-10 and ImageNet32x32",
        "AdamW lowers the test error of Shake-Shake networks by about 15 % of its value.",
        "Loshchilov & Hutter 2019, Figure 4, arXiv:1711.05101",
        "It takes networks of 11 and 26 million parameters for up to 1,800 epochs.",
        "The direction agrees with the claim accuracy on inputs of different scales; the size "
        "cannot be told from digits.",
    ),
    _untestable(
        "equal-training-loss",
        "Lower test error at the same training loss",
        "AdamW's curves coincide with Adam's for the first half of the run; later it has a lower "
        "test error at equal training loss.",
        "Loshchilov & Hutter 2019, Figure 3, arXiv:1711.05101",
        "It is about the second half of 1,800 epochs; runs of minutes have no such half.",
        "That the beginnings coincide agrees with the claim convergence-speed.",
    ),
    _untestable(
        "language-models",
        "L2's failure in Adam is why language models need AdamW",
        "Adam generalises worse because L2 fails in it, and that is the root cause for large "
        "language models.",
        "Introductory texts on AdamW",
        "It takes language models of a size at which weight decay matters, trained many times.",
        "Overstated: in one pass over the data there is little to overfit. Decay there acts as "
        "the memory of an average over steps (Wang & Aitchison 2024, arXiv:2405.13698) and "
        "steadies the loss (D'Angelo et al. 2023, arXiv:2310.04415).",
    ),
    _untestable(
        "faster-language-models",
        "Optimizers twice as fast as AdamW",
        "Newer optimizers train language models 1.4 to 2 times as fast as AdamW.",
        "Papers on new optimizers; checked by Wen et al. 2025, arXiv:2509.02046",
        "It takes models of 0.1 to 1.2 billion parameters, every optimizer tuned alike.",
        "With equal tuning the gain shrank to 1.4 at 0.1 billion and 1.1 at 1.2 billion "
        "parameters, and rankings changed during the run: compare at the end only.",
    ),
)
