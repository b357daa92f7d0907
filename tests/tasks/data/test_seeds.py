import torch

from qprune.tasks.data.seeds import derived_seed, generator, seeded


def test_seeds_differ_by_purpose_and_are_the_same_everywhere() -> None:
    assert derived_seed(0, "order") == 5231958647509549229
    assert len({derived_seed(s, e, p) for s in range(3) for e in range(3) for p in ("order", "network")}) == 18
    assert torch.equal(torch.rand(4, generator=generator(1, "a")), torch.rand(4, generator=generator(1, "a")))


def test_seeded_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    with seeded(7, "network"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    with seeded(7, "network"):
        assert torch.equal(torch.rand(3), first)
