"""Every family's twin against the plain diffusers pipeline."""

from __future__ import annotations

import pytest
import torch

from diffalign import registry
from diffalign.models import sdxl
from diffalign.models._model import Model
from diffalign.types import Policy, UserError

from .conftest import Twins, inputs, make_nonzero

PROMPTS = ["a red circle", "Caf\u00e9 \u65e5\u672c, 100% \U0001f600", "long " * 60]


def test_names_are_the_families() -> None:
    assert registry.names("model") == ["sd15", "sd3", "sdxl"]


def test_tiny_needs_no_folder_and_is_a_policy(family: str) -> None:
    model = registry.build("model", {"name": family, "path": "tiny"}).load()
    assert isinstance(model, Model) and model.name == family
    assert all(hasattr(model, name) for name in ("schedule", "__call__", "adapter_off")), Policy
    again = registry.build("model", {"name": family, "path": "tiny"}).load()
    for part in ("vae", "text", "denoiser"):
        assert model.fingerprint(part) == again.fingerprint(part)


def test_prompts_equal_the_pipelines_own(twins: Twins, twin: str) -> None:
    model, pipeline = twins.load(twin), twins.pipeline(twin)
    got = model.encode_prompts(PROMPTS)
    with torch.no_grad():
        if twin.startswith("sd3"):
            embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
            want = {"prompt_embeds": embeds, "pooled": pooled}
        elif twin == "sdxl":
            embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
            want = {"prompt_embeds": embeds, "pooled": pooled}
        else:
            want = {"prompt_embeds": pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]}
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert len(got[name].flatten(1).unique(dim=0)) == len(PROMPTS)


def test_cut_prompts_are_a_short_counted_line(
    twins: Twins, twin: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """For what diffusers says with every prompt in full. SD3's T5 reads 256 tokens where CLIP reads 77."""
    model, most = twins.load(twin), 256 if twin == "sd3" else 77
    model.encode_prompts(["a red circle"])
    words = model.pipeline.tokenizer_3 if twin == "sd3" else model.pipeline.tokenizer
    longest = max(
        n for n in range(1, 300) if len(words("a " * n, truncation=True, max_length=most + 1).input_ids) <= most
    )
    just, more = "a " * longest, "a " * (longest + 1)
    model.encode_prompts([just])
    assert not caplog.messages
    model.encode_prompts([more, "a circle " * 2000])
    assert caplog.messages == [
        f"2 of 4 prompts so far are longer than the {most} tokens that are read: the rest of them is cut off"
    ]
    for _ in range(4):
        model.encode_prompts([more, just])
    assert len(caplog.messages) == 1  # the next line is at the tenth
    model.encode_prompts([more] * 4)
    assert caplog.messages[-1].startswith("10 of 16 prompts")
    assert "Token indices" not in capfd.readouterr().err


def test_empty_prompt_is_the_pipelines_unconditional(twins: Twins, twin: str) -> None:
    model, pipeline = twins.load(twin), twins.pipeline(twin)
    got = model.empty_prompt()
    with torch.no_grad():
        if twin.startswith("sd3"):
            _, embeds, _, pooled = pipeline.encode_prompt("x", None, None)
        elif twin == "sdxl":
            _, embeds, _, pooled = pipeline.encode_prompt("x")
        else:
            (_, embeds), pooled = pipeline.encode_prompt("x", "cpu", 1, True), None
    assert torch.equal(got["prompt_embeds"], embeds)
    if pooled is not None:
        assert torch.equal(got["pooled"], pooled)
    assert (got["prompt_embeds"].abs().max() == 0) == (twin == "sdxl")


def test_sdxl_without_forced_zeros_encodes_the_empty_text(twins: Twins) -> None:
    model = twins.load("sdxl")
    text = model.fingerprint("text")
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert torch.equal(model.empty_prompt()["prompt_embeds"], model.encode_prompts([""])["prompt_embeds"])
    assert model.fingerprint("text") != text


def test_sequence_length_of_sd3(twins: Twins) -> None:
    for twin in ("sd3", "sd3-no-t5"):
        short, long = twins.load(twin, max_sequence_length=8), twins.load(twin)
        assert short.encode_prompts(["a"])["prompt_embeds"].shape[1] == 77 + 8
        assert long.encode_prompts(["a"])["prompt_embeds"].shape[1] == 77 + 256
        assert short.fingerprint("text") != long.fingerprint("text")
        assert short.fingerprint("denoiser") == long.fingerprint("denoiser")


@torch.no_grad()
def test_forward_equals_the_networks_own_call(twins: Twins, twin: str) -> None:
    model, pipeline = twins.load(twin), twins.pipeline(twin)
    xt, t, cond = inputs(model)
    time = model.schedule.network_time(t)
    embeds = cond["prompt_embeds"]
    if twin.startswith("sd3"):
        assert torch.allclose(time, t * 1000)
        want = pipeline.transformer(xt, embeds, cond["pooled"], time).sample
    else:
        # t = 1 is the last of 1000 timesteps, t = 0.2 the 200th
        assert torch.allclose(time, torch.tensor([199.0, 999.0]), atol=1e-3)
        added = None
        if twin == "sdxl":
            ids = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 32).repeat(2, 1)
            added = {"text_embeds": cond["pooled"], "time_ids": ids}
        want = pipeline.unet(xt, time, embeds, added_cond_kwargs=added).sample
    assert torch.equal(model(xt, t, cond), want)


def test_size_order_is_original_crop_target(twins: Twins) -> None:
    model = twins.load("sdxl")
    rows = [torch.tensor([pair]) for pair in ([1, 2], [3, 4], [5, 6])]
    want = twins.pipeline("sdxl")._get_add_time_ids((1, 2), (3, 4), (5, 6), torch.float32, 32)
    assert torch.equal(model.size_cond(*rows)["time_ids"], want)
    assert twins.load("sd3").size_cond(*rows) == {}


@torch.no_grad()
def test_latents_are_scaled_as_in_diffusers(twins: Twins, twin: str) -> None:
    model, pipeline = twins.load(twin), twins.pipeline(twin)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.encode_images(pixels)
    assert mean.shape == std.shape == (2, *model.latent_shape(32, 32))
    posterior, settings = pipeline.vae.encode(pixels).latent_dist, pipeline.vae.config
    shift = settings.shift_factor or 0
    want = (posterior.sample(torch.Generator().manual_seed(3)) - shift) * settings.scaling_factor
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(mean + std * noise, want, atol=1e-5)
    image = pipeline.vae.decode(want / settings.scaling_factor + shift).sample
    decoded = model.decode(want)
    assert decoded.shape == (2, 3, 32, 32) and decoded.dtype == torch.float32
    assert torch.allclose(decoded, pipeline.image_processor.postprocess(image, "pt"), atol=1e-5)


def test_schedules(twins: Twins) -> None:
    assert "RectifiedFlow" in type(twins.load("sd3").schedule).__name__
    x0, noise, t = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0), torch.tensor([0.5])
    assert twins.load("sd15").schedule.target(x0, noise, t).item() == 2.0
    schedule = twins.load("sd21").schedule
    alpha, sigma = schedule.alpha_sigma(t)
    assert schedule.target(x0, noise, t).item() == pytest.approx((2 * alpha - sigma).item(), rel=1e-5)


def test_frozen_weights_have_the_dtype_and_trained_ones_float32(twins: Twins, family: str) -> None:
    model = twins.load(family, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.pipeline.vae.dtype == torch.float32
    assert model.pipeline.text_encoder.dtype == torch.bfloat16
    assert {p.dtype for p in model.trainable_parameters().values()} == {torch.float32}
    xt, t, cond = inputs(model)
    assert torch.isfinite(model(xt, t, cond).float()).all()
    full = twins.load(family, dtype="bfloat16", trainable="full")
    assert {p.dtype for p in full.trainable_parameters().values()} == {torch.float32}
    assert full.pipeline.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_only_the_denoiser_is_trained(twins: Twins, family: str, trainable: str) -> None:
    model = twins.load(family, trainable=trainable)
    names = set(model.trainable_parameters())
    assert names and all((".lora_" in name) == (trainable == "lora") for name in names)
    if trainable == "full":
        assert names == {name for name, _ in model.network.named_parameters()}
    for name, part in model.pipeline.components.items():
        if isinstance(part, torch.nn.Module) and part is not model.network:
            assert not any(p.requires_grad for p in part.parameters()), name


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_gradient_checkpointing_does_not_change_gradients(twins: Twins, family: str, trainable: str) -> None:
    gradients = []
    for is_on in (False, True):
        model = twins.load(family, trainable=trainable, gradient_checkpointing=is_on)
        if trainable == "lora":
            make_nonzero(model)
        num_calls = 0

        def count(*_: object) -> None:
            nonlocal num_calls
            num_calls += 1

        model._layers[0].register_forward_hook(count) if model._layers else None
        model(*inputs(model)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.trainable_parameters().items()})
        if trainable == "lora":
            assert num_calls == (2 if is_on else 1)
    used = [name for name, grad in gradients[0].items() if grad is not None]
    assert len(used) > 10
    for name in used:
        assert torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-8), name


def test_compiled_blocks_compute_the_same(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the tracer with a wrapped attention kernel, without the code generator: both are slow on a CPU."""
    from diffusers import ModelMixin

    original = ModelMixin.compile_repeated_blocks
    monkeypatch.setattr(ModelMixin, "compile_repeated_blocks", lambda self: original(self, backend="eager"))
    plain, compiled = (twins.load("sdxl", attention="math", compile=key) for key in (False, "blocks"))
    call = inputs(plain)
    results = []
    for model in (plain, compiled):
        make_nonzero(model)
        pred = model(*call)
        pred.square().mean().backward()
        with torch.no_grad(), model.adapter_off():
            base = model(*call)
        gradients = [p.grad for p in model.trainable_parameters().values() if p.grad is not None]
        results.append([pred.detach(), base, *gradients])
    assert len(results[0]) == len(results[1]) > 10
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert list(plain.state_dict_trainable()) == list(compiled.state_dict_trainable())


def test_offloading_keeps_the_results(twins: Twins, family: str) -> None:
    model = twins.load(family)
    before = model.encode_prompts(["a"])["prompt_embeds"]
    model.offload_encoders()
    assert torch.equal(model.encode_prompts(["a"])["prompt_embeds"], before)
    assert model.decode(torch.zeros(1, *model.latent_shape(32, 32))).shape == (1, 3, 32, 32)


def test_state_round_trip_and_refusals(twins: Twins, family: str) -> None:
    model, other = twins.load(family), twins.load(family)
    make_nonzero(model)
    other.load_trainable({name: value.clone() for name, value in model.state_dict_trainable().items()})
    call = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(*call), other(*call))
    state = dict(model.state_dict_trainable())
    name, value = state.popitem()
    with pytest.raises(UserError, match="one side only"):
        other.load_trainable(state)
    with pytest.raises(UserError, match="instead of"):
        other.load_trainable(state | {name: value[:1, :1]})


def test_resolution(twins: Twins) -> None:
    assert twins.load("sdxl").resolution == (32, 32)
    model = twins.load("sdxl", resolution=[48, 32])
    assert model.resolution == (48, 32) and model.latent_shape(48, 32) == (4, 24, 16)
    with pytest.raises(UserError, match="multiples of 4"):
        twins.load("sd3", resolution=34)


def test_fingerprint_follows_content(twins: Twins, tmp_path) -> None:
    parts = ("vae", "text", "denoiser")
    other = registry.build("model", {"name": "sdxl", "path": str(sdxl.build_tiny(tmp_path / "b", seed=1))}).load()
    model = twins.load("sdxl")
    before = [model.fingerprint(part) for part in parts]
    assert all(a != other.fingerprint(part) for a, part in zip(before, parts, strict=True))
    make_nonzero(model)
    assert [model.fingerprint(part) for part in parts] == before
    vocabulary = tmp_path / "b" / "tokenizer" / "tokenizer.json"
    text, vae = other.fingerprint("text"), other.fingerprint("vae")
    vocabulary.write_text(vocabulary.read_text() + "\n")
    assert other.fingerprint("text") != text and other.fingerprint("vae") == vae
