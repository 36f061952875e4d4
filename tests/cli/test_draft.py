"""`--draft` on the command line: the note, replay, plans, and what it does not go with."""

from __future__ import annotations


def test_a_draft_says_what_it_does_and_is_replayed(sfumato_each, model, tmp_path):
    apple = ["generate", "a red apple, 3d", "--seed", "7"]
    draft, again, whole, other, quiet = sfumato_each(
        [
            [*apple, "--draft", "-o", "draft.png", "--json"],
            ["replay", "draft.png", "--json"],
            [*apple, "-o", "whole.png", "--json"],
            ["generate", "cat", "--draft", "--model", model, "-o", "other.png"],
            [*apple, "--draft", "--quiet", "-o", "quiet.png"],
        ],
        cwd=tmp_path,
    )
    told = draft.succeeded().json["request"]
    assert (told["steps"], told["scheduler"], told["vae"]) == (4, "lcm", "built-in/tiny-vae")
    assert "a draft: 4 steps of lcm with built-in/few-step, decoded by built-in/tiny-vae; for the full" in draft.err
    assert again.succeeded().json["identical"]
    assert whole.succeeded().json["request"]["steps"] == 20
    assert "a draft: 10 steps of unipc, decoded by the model's VAE" in other.succeeded().err
    assert "draft" not in quiet.succeeded().err


def test_plans_know_it(sfumato_each, model, tmp_path):
    plan = ["plan", "cat", "--facts", "rtx-4090", "--json"]
    commands = [[*plan, *more] for more in ([], ["--model", model], ["--model", "sd15"], ["--model", "sdxl-turbo"])]
    outcomes = sfumato_each([one for line in commands for one in (line, [*line, "--draft"])], cwd=tmp_path)
    for whole, draft in zip(outcomes[::2], outcomes[1::2], strict=True):
        seconds = [one.succeeded().json["plan"]["seconds"] for one in (whole, draft)]
        assert seconds[1] <= seconds[0]
    assert outcomes[1].json["model"]["vae"]["parameters"] < outcomes[0].json["model"]["vae"]["parameters"] / 5


def test_what_a_draft_does_not_go_with(sfumato_each, tmp_path):
    apple = ["generate", "a red apple, 3d", "--draft"]
    fast, vae, refined = sfumato_each(
        [[*apple, "--fast", "30dB"], [*apple, "--vae", "built-in/sketch"], [*apple, "--refiner", "nowhere"]],
        cwd=tmp_path,
    )
    fast.failed(2, "draft and fast cannot be combined: a draft is not near the exact image; drop one of them")
    vae.failed(1, "is a LoRA, not a VAE")
    refined.failed(1, "there is no folder nowhere")
    assert list(tmp_path.iterdir()) == []
