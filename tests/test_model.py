"""The cost model reads machine code and launches right, and says that it is a model."""

import csv
import dataclasses
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="compiles Triton kernels")

from test_kernel_count import Operations

from benchmarks.model import __main__ as command
from benchmarks.model import formulas, picture, report
from benchmarks.model.cost import (
    GPUS,
    LAUNCH_US,
    kernel_cost,
    multiply_adds,
    passes,
    programs_per_multiprocessor,
)
from benchmarks.model.machine_code import Code, layout_changes_in_loops, parse, regions
from benchmarks.model.prediction import predict, recorded
from genfast.launch import start
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep

H100 = GPUS["h100"]

# Milliseconds that the model may predict for one step: (model, batch, card) to the most.
STEPS = {
    ("dcgan", 128, "h100"): 0.81,
    ("dcgan", 1024, "h100"): 4.75,
    ("dcgan", 128, "a100"): 2.0,
    ("dcgan", 128, "rtx4090"): 3.2,
    ("conv-vae", 128, "h100"): 0.42,
}
# Those whose kernels other tests compile too; the others compile their own for a minute each.
COMPILED_ANYWAY = {("dcgan", 128, "h100"), ("dcgan", 1024, "h100")}
# Beside images and logits a kernel may take so many times what moving its tensors takes, or 5 us.
ENDS = 1.5
# One that also normalises what it reads issues for longer; the pass that this saves took as long.
ENDS_OF_Z = 1.65
# And a product of at least so many operations this many times what its own take at the card's clock
# and full rate, by batch; or what moving its tensors takes, the output of the layer below included.
LARGE = 1e9
# Of two products in one kernel: of the time of their operations, or of moving its tensors.
BOTH = 1.3
PRODUCTS = {128: 1.6, 1024: 1.25}

# Two loops, one inside the other, the inner one unrolled four times with a loop for what is left;
# a wait that asks again elsewhere; a 64-bit division that is called only for large numbers, and one
# that is always called; and, after the end, what no branch reaches.
LISTING = """
.text.kernel:
	//## File "/somewhere/kernels/nowhere.py", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   I2F.RP R0, UR9 ;
        /*0030*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0040*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
.L_x_1:
        /*0050*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
.L_x_2:
        /*0060*/                   UTMALDG.4D [UR8], [UR4] ;
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0080*/              @!P0 BRA `(.L_x_7) ;
.L_x_3:
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00b0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*00c0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
.L_x_4:
        /*00d0*/                   LDG.E R4, [R2] ;
        /*00e0*/                   FADD R5, R5, R4 ;
        /*00f0*/              @!P1 BRA `(.L_x_4) ;
        /*0100*/               @P2 BRA `(.L_x_2) ;
        /*0110*/                   STG.E [R2], R5 ;
        /*0120*/                   EXIT ;
.L_x_7:
        /*0130*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0140*/              @!P0 BRA `(.L_x_7) ;
        /*0150*/                   BRA `(.L_x_3) ;
        .type           $__internal_0_$__cuda_sm20_div_s64,@function
$__internal_0_$__cuda_sm20_div_s64:
        /*0160*/                   I2F.U64.RP R66, R72 ;
        /*0170*/                   RET.REL.NODEC R66 `(kernel) ;
.L_x_8:
        /*0180*/                   BRA `(.L_x_8);
        /*0190*/                   NOP;
        /*01a0*/                   NOP;
"""


def test_loops_are_found_and_counted_in_a_listing():
    straight, outer, inner = regions(parse(LISTING))
    # LDC, BRA, I2F, BRA; CALL with the two of what it calls; STG and EXIT.
    assert straight.instructions == 4 + 3 + 2
    # UTMALDG to DEPBAR, the branch back and the one from the wait that lies elsewhere.
    assert outer.instructions == 3 + 4 + 1 + 1
    assert inner.instructions == 3
    assert (outer.parent, inner.parent) == (0, 1)
    assert outer.multiplications == {"HGMMA.64x128x16.F32.BF16": 2}
    assert outer.waits_inside and not inner.waits_inside
    assert outer.loads == "asynchronous" and inner.loads == "waiting"


def test_an_asynchronous_copy_is_no_load_that_waits():
    copying = LISTING.replace("LDG.E R4, [R2]", "LDGSTS.E.128 [R4], [R2.64]")
    assert regions(parse(copying))[2].loads == "asynchronous"


@pytest.mark.parametrize(
    ("opcode", "name", "size"),
    [
        ("LDG.E", "LDG", 4),
        ("LDG.E.U8", "LDG", 1),
        ("LDG.E.U16.CONSTANT", "LDG", 2),
        ("LDG.E.LTC128B.64", "LDG", 8),
        ("LDGSTS.E.BYPASS.LTC128B.128", "LDGSTS", 16),
    ],
)
def test_bytes_that_an_instruction_moves(opcode, name, size):
    straight, _, inner = regions(parse(LISTING.replace("LDG.E R4", f"{opcode} R4")))
    assert inner.widths(name) == {size: 1}
    assert straight.widths("STG") == {4: 1} and not straight.widths(name)


def test_a_branch_that_cannot_be_followed_is_said():
    with pytest.raises(ValueError, match="expected branches to labels, got BRX"):
        regions(parse(LISTING.replace("@P2 BRA `(.L_x_2)", "BRX R2 -0x30")))


def _code(*loops):
    (straight, *_) = regions(parse(LISTING))
    made = [
        dataclasses.replace(straight, instructions=10, source=source, line=1, parent=0, unroll=n)
        for source, n in loops
    ]
    return Code((straight, *made), registers=64, spills=0, layout_changes=0)


def test_an_unrolled_loop_and_the_rest_of_it_share_the_passes():
    code = _code(("sum_partials.first", 4), ("sum_partials.first", 1))
    assert passes(code, {"sum_partials.first": 11}, "sum_partials") == [1, 2, 3]


def test_an_unknown_loop_is_said():
    with pytest.raises(LookupError, match="expected the formula of k to say how often k.x runs"):
        passes(_code(("k.x", 1)), {"k.y": 3}, "k")


def test_an_unknown_kernel_is_said():
    launch = dataclasses.replace(_launch("sum_partials"), name="new_kernel")
    with pytest.raises(LookupError, match="got the kernel new_kernel without one"):
        kernel_cost(launch, _code(), 4, 0, H100)


def test_layout_changes_count_only_inside_loops():
    ttgir = """
    %0 = ttg.convert_layout %a : tensor<4xf32> loc(#loc)
    %1 = scf.for %i = %c0 to %n step %c1 iter_args(%acc = %z) -> (tensor<4xf32>) {
      %2 = ttg.local_load %m : !ttg.memdesc<4xf32> -> tensor<4xf32> loc(#loc)
      %3 = scf.if %p -> (tensor<4xf32>) {
        %4 = ttg.convert_layout %2 : tensor<4xf32> loc(#loc)
        scf.yield %4 : tensor<4xf32>
      } loc(#loc)
      scf.yield %3 : tensor<4xf32> loc(#loc)
    } loc(#loc)
    %5 = ttg.convert_layout %1 : tensor<4xf32> loc(#loc)
    """
    assert layout_changes_in_loops(ttgir) == 2


@pytest.mark.parametrize(
    ("gpu", "registers", "warps", "shared", "programs"),
    [
        ("h100", 32, 8, 0, 8),  # 64 warps
        ("h100", 128, 8, 0, 2),  # registers, exactly
        ("h100", 129, 8, 0, 1),
        ("h100", 168, 4, 0, 3),  # 5376 registers a warp: 12 warps
        ("h100", 32, 1, 0, 32),  # blocks
        ("h100", 81, 4, 0, 5),  # as 88 registers: six would fit if each were counted
        ("h100", 64, 4, 113 * 1024, 2),
        ("h100", 64, 4, 114 * 1024, 1),  # with the reserved kilobyte
        ("a100", 255, 8, 0, 1),
        ("a100", 64, 4, 81 * 1024, 2),
        ("rtx4090", 32, 8, 0, 6),  # 48 warps
        ("rtx4090", 32, 1, 0, 24),  # blocks
    ],
)
def test_programs_per_multiprocessor(gpu, registers, warps, shared, programs):
    assert programs_per_multiprocessor(GPUS[gpu], registers, warps, shared) == programs


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_card_computes_what_its_datasheet_says(gpu):
    """Clock, multiprocessors and rate agree; datasheets take a clock up to 5 % above ours."""
    computed = 2e-3 * gpu.macs * gpu.multiprocessors * gpu.clock
    assert 0.95 * gpu.bf16 <= computed <= 1.001 * gpu.bf16


def _launch(name):
    recording, _ = recorded("dcgan", 128, "sm_90")
    return next(launch for launch in recording.launches if launch.name == name)


def test_matrix_instructions_compute_every_tile_once():
    """Loops are recognised and run as often as they should: the tiles say it another way."""
    recording, codes = recorded("dcgan", 128, "sm_90")
    seen = set()
    for launch in recording.launches:
        if launch.name not in ("fprop", "dgrad", "wgrad"):
            continue
        formula, arguments = formulas.formula(launch)
        times = formula.passes(arguments)
        compiled, code = recording.code[launch.compiled], codes[launch.compiled]
        executed = sum(
            count * multiply_adds(opcode, compiled.warps) * run
            for region, run in zip(code.regions, passes(code, times, launch.name), strict=True)
            for opcode, count in region.multiplications.items()
        )
        block = arguments.BLOCK_M * arguments.BLOCK_N * arguments.BLOCK_K
        (steps,) = times.values()
        assert executed == block * steps, (launch, code.regions)
        whole, needed = launch.programs * executed, formula.flops(arguments) // 2
        if launch.name != "wgrad" and arguments.C_small % 64 == arguments.C_big % 64 == 0:
            assert whole == needed, launch
        else:  # The last split of a wgrad has fewer tiles; 3 or 100 channels fill a part of one.
            assert whole >= needed, launch
        seen.add(launch.name)
    assert seen == {"fprop", "dgrad", "wgrad"}


def test_loops_of_a_compiled_kernel_are_those_of_its_source():
    _, codes = recorded("dcgan", 128, "sm_90")
    launch = _launch("batch_statistics")
    straight, groups, *parts = codes[launch.compiled].regions
    # For each group two passes over its parts, one after the other.
    assert groups.source == "batch_statistics.group" and groups.parent == 0
    assert [loop.source for loop in parts] == ["_combine.start"] * 2
    assert [loop.parent for loop in parts] == [1, 1]
    assert len({loop.line for loop in parts}) == 2
    assert all(loop.loads == "waiting" for loop in parts)
    assert straight.count("EXIT") and not straight.count("NOP")


def test_a_loop_is_not_taken_for_the_one_inside_it():
    """Of whose lines the compiler may leave more in the outer one, which adds up other groups."""
    _, codes = recorded("dcgan", 128, "sm_90")
    code = codes[_launch("norm_backward").compiled]
    outer, own, inner = code.regions[1:]
    assert outer.source == "_store_total.other"
    assert own.source == inner.source == "_sums_of_parts.first"
    assert (outer.parent, own.parent, code.regions[inner.parent]) == (0, 0, outer)


@pytest.mark.kernels
def test_the_recorded_launches_are_those_of_a_step(monkeypatch):
    names = []
    monkeypatch.setattr(start, "architecture", lambda tensor: "sm_90")
    monkeypatch.setattr(
        start, "kernel", lambda kernel, grid, **arguments: names.append(kernel.__name__)
    )
    torch.use_deterministic_algorithms(False)
    step = GANStep(
        DCGANGenerator(),
        DCGANDiscriminator(),
        precision="bf16",
        capture=False,
        output="logits",
    )
    images = torch.zeros(128, 3, 64, 64).to(memory_format=torch.channels_last)
    step(images)
    names.clear()
    with Operations(names):
        step(images)
    recording, _ = recorded("dcgan", 128, "sm_90")
    assert [launch.name for launch in recording.launches] == names


def test_an_update_reads_and_writes_each_weight_once():
    recording, _ = recorded("dcgan", 128, "sm_90")
    # In the order of the step: only the discriminator runs once more, with fresh copies.
    networks = (DCGANDiscriminator(), 2), (DCGANGenerator(), 0)
    launches = [launch for launch in recording.launches if launch.name == "adam"]
    for launch, (network, copy) in zip(launches, networks, strict=True):
        expected = 0
        for p in network.parameters():
            gradient = 2 if p.dim() == 4 else 4  # That of a batch norm is in float32.
            each = 3 * 4 + 3 * 4 + gradient + (copy if p.dim() == 4 else 0)
            step = 4
            expected += each * p.numel() + step
        # And a table of 8 bytes for each chunk, and for each of 9 facts about a weight.
        table = 8 * (launch.programs + 9 * len(list(network.parameters())))
        assert launch.bytes == expected + table


def test_a_product_counts_the_multiplications_of_its_layer():
    launch = _launch("logits_wgrad")
    formula, arguments = formulas.formula(launch)
    # The first wgrad of a step is the logit's: 256 images, 512 channels of 4 x 4, one output.
    assert formula.flops(arguments) == 2 * 256 * 512 * 16
    step = sum(cost.flops for cost in predict("dcgan", 128, "h100"))
    # Multiply-adds an image of a pass over the generator, and over the discriminator.
    latent, logit, rgb = 100 * 512 * 16, 512 * 16, 64 * 3 * 16 * 32 * 32
    between = 3 * 512 * 256 * 16 * 4 * 4
    generator, discriminator = latent + between + rgb, logit + between + rgb
    # Generator: forward and both gradients, but the latent's. Discriminator: forward for real and
    # generated images and again for the generator, and gradients of both, but the images' only for
    # the generator, which needs none of the weights.
    an_image = (3 * generator - latent) + (3 + 2 * 2 + 1) * discriminator - 2 * rgb
    assert step == 2 * 128 * an_image


def test_table_csv_and_picture_agree_and_say_that_they_are_a_model(tmp_path):
    costs = predict("dcgan", 128, "h100")
    text = report.table(costs, H100, "a step")
    path = tmp_path / "made" / "model.csv"
    report.write_csv(costs, path)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(costs) == text.count("\n") - 2
    total = report.totals(costs, H100).predicted
    digits = 0.0005  # of a column in microseconds
    assert sum(float(row["predicted_us"]) for row in rows) == pytest.approx(
        1e3 * total, abs=digits * len(rows)
    )
    assert f"genfast: {total:.3f} ms in {len(costs)} launches" in text
    for row in rows:
        terms = [float(row[f"{term}_us"]) for term in ("issue", "tensor", "memory", "latency")]
        assert float(row["predicted_us"]) == pytest.approx(max(terms) + 1.5, abs=2 * digits)
        assert row["note"] == report.NOTE
    first, *_, last = text.splitlines()
    assert report.NOTE in first and report.NOTE in last
    figure = picture.figure(costs, None, H100, "a step")
    (axes,) = figure.axes
    assert report.NOTE in axes.get_title() and report.NOTE in axes.get_xlabel()
    widths = sum(bar.get_width() for bar in axes.patches)
    assert widths == pytest.approx(1e3 * total, rel=1e-9)


@pytest.mark.parametrize("named", [False, True])
def test_the_command_writes_where_it_is_told_or_beside_the_results(named, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    files = [tmp_path / "mine.csv", tmp_path / "mine.png"] if named else []
    csv_file, plot_file = ([file] for file in files) if named else ([], [])
    arguments = ["model", "--csv", *map(str, csv_file), "--plot", *map(str, plot_file)]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    stem = tmp_path / "model_dcgan_batch128_h100"
    for path in files or (stem.with_suffix(".csv"), stem.with_suffix(".png")):
        assert path.stat().st_size > 1000


def test_the_command_says_what_it_expects(monkeypatch):
    monkeypatch.setattr("sys.argv", ["model", "--batch", "0"])
    with pytest.raises(SystemExit, match="expected a batch of at least 1 image, got 0"):
        command.main()


@pytest.mark.parametrize(
    ("step", "most"),
    [
        pytest.param(*row, marks=() if row[0] in COMPILED_ANYWAY else pytest.mark.exhaustive)
        for row in STEPS.items()
    ],
    ids=str,
)
def test_a_step_is_predicted_to_take_no_longer(step, most):
    costs = predict(*step)
    assert report.totals(costs, GPUS[step[2]]).predicted <= most


@pytest.mark.parametrize("batch", PRODUCTS)
def test_each_kernel_is_predicted_to_take_no_longer(batch):
    checked = Counter()
    for cost in predict("dcgan", batch, "h100"):
        name = cost.launch.name
        if name == "dgrad_wgrad_image":  # Bound by tensor cores, and still less than the two were.
            most = BOTH * cost.floor
        elif "image" in name or "logits" in name:
            of_z = name == "to_image" and cost.launch.arguments["HAS_NORM"]
            most = max(5.0, (ENDS_OF_Z if of_z else ENDS) * cost.memory)
        elif name in ("fprop", "dgrad", "wgrad") and cost.flops > LARGE * batch / 128:
            rate = 2e3 * H100.macs * H100.multiprocessors * H100.clock  # a microsecond
            most = max(PRODUCTS[batch] * cost.flops / rate, cost.memory + LAUNCH_US)
        else:
            continue
        checked[name] += 1
        assert cost.predicted <= most, cost
    # Three large layers of each network: generator forward once, discriminator twice; backward
    # alike, but that the generator's step needs no weight gradients of the discriminator, whose own
    # step makes the last dgrad and the weight gradient at the images together.
    assert [checked[name] for name in ("fprop", "dgrad", "wgrad")] == [9, 8, 6]
    assert checked["dgrad_wgrad_image"] == 1
    ends = {"pad_image", "join_images", "fprop_image", "norm_sums_image", "to_image"}
    assert ends | {"logits_fprop", "logits_dgrad", "logits_wgrad"} < set(checked)
