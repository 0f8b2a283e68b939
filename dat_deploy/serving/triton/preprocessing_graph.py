"""The preprocessing as an ONNX graph, for a server to run before the network: bit for bit what Pillow and NumPy do.

ONNX's own Resize is not that: ONNX Runtime computes its weights in float32, so that up to 0.12 % of a noise picture's
samples are one level off. Here each pass of the resize is a product with the matrix of Pillow's weights, which are
computed in the graph, since height and width are free. Pillow resizes in fixed point with weights of 22 bits; float64
holds such sums of integers exactly, in whatever order they are added, so that nothing depends on the CPU.
"""

import onnx
import onnx.parser

from dat_deploy.images.preprocess import Preprocessing

__all__ = ["preprocessing_graph"]

# As Pillow does it: first along the width, rounded to 8 bits, then along the height. `weights` is [length of the crop,
# length of the picture], for the samples `first` to `last` of `resized`.
_GRAPH = """
<ir_version: 10, opset_import: ["": 18, "dat_deploy.preprocessing": 1]>
preprocessing (uint8[batch, pixel_height, pixel_width, 3] pixels) => (float[batch, 3, {height}, {width}] image)
<float[3, 1, 1] mean = {{{mean}}}, float[3, 1, 1] std = {{{std}}}>
{{
    shape = Shape(pixels)
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    pixel_height = Gather(shape, one)
    pixel_width = Gather(shape, two)
    columns = dat_deploy.preprocessing.weights
        <resized: int = {resize_width}, first: int = {left}, last: int = {right}> (pixel_width)
    rows = dat_deploy.preprocessing.weights
        <resized: int = {resize_height}, first: int = {top}, last: int = {bottom}> (pixel_height)
    planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
    samples = Cast <to = 11> (planes)
    columns_last = Transpose <perm = [1, 0]> (columns)
    wide = MatMul(samples, columns_last)
    narrow = dat_deploy.preprocessing.round_to_8_bits(wide)
    tall = MatMul(rows, narrow)
    resized = dat_deploy.preprocessing.round_to_8_bits(tall)
    levels = Cast <to = 1> (resized)
    white = Constant <value_float = 255.0> ()
    scaled = Div(levels, white)
    centred = Sub(scaled, mean)
    image = Div(centred, std)
}}

<domain: "dat_deploy.preprocessing", opset_import: ["": 18]>
weights <resized, first, last> (length) => (fixed_point)
{{
    zero = Constant <value = double {{0.0}}> ()
    half = Constant <value = double {{0.5}}> ()
    one = Constant <value = double {{1.0}}> ()
    two = Constant <value = double {{2.0}}> ()
    four = Constant <value = double {{4.0}}> ()
    five = Constant <value = double {{5.0}}> ()
    eight = Constant <value = double {{8.0}}> ()
    a = Constant <value = double {{-0.5}}> ()
    a_plus_two = Add(a, two)
    a_plus_three = Add(a_plus_two, one)
    to_fixed_point = Constant <value = double {{4194304.0}}> ()

    axes = Constant <value_ints = [0]> ()
    scalar_length = Squeeze(length, axes)
    sources = Cast <to = 11> (scalar_length)
    resized_int = Constant <value_int: int = @resized> ()
    targets = Cast <to = 11> (resized_int)
    scale = Div(sources, targets)
    stretch = Max(scale, one)
    shrink = Div(one, stretch)
    support = Mul(two, stretch)

    first_int = Constant <value_int: int = @first> ()
    first_target = Cast <to = 11> (first_int)
    last_int = Constant <value_int: int = @last> ()
    last_target = Cast <to = 11> (last_int)
    target = Range(first_target, last_target, one)
    target_centre = Add(target, half)
    row_centre = Mul(target_centre, scale)
    last_axis = Constant <value_ints = [1]> ()
    centre = Unsqueeze(row_centre, last_axis)

    lowest = Sub(centre, support)
    lowest_half = Add(lowest, half)
    begin = Floor(lowest_half)
    highest = Add(centre, support)
    highest_half = Add(highest, half)
    end = Floor(highest_half)
    source = Range(zero, sources, one)
    before = Less(source, begin)
    within = Less(source, end)
    not_before = Not(before)
    used = And(not_before, within)

    from_centre = Sub(source, centre)
    from_centre_half = Add(from_centre, half)
    signed_distance = Mul(from_centre_half, shrink)
    x = Abs(signed_distance)
    near_1 = Mul(a_plus_two, x)
    near_2 = Sub(near_1, a_plus_three)
    near_3 = Mul(near_2, x)
    near_4 = Mul(near_3, x)
    near = Add(near_4, one)
    far_1 = Sub(x, five)
    far_2 = Mul(far_1, x)
    far_3 = Add(far_2, eight)
    far_4 = Mul(far_3, x)
    far_5 = Sub(far_4, four)
    far = Mul(far_5, a)
    is_near = Less(x, one)
    is_far = Less(x, two)
    far_or_zero = Where(is_far, far, zero)
    cubic = Where(is_near, near, far_or_zero)
    weight = Where(used, cubic, zero)
    sum = ReduceSum <keepdims = 1> (weight, last_axis)
    share = Div(weight, sum)

    exact = Mul(share, to_fixed_point)
    magnitude = Abs(exact)
    magnitude_half = Add(magnitude, half)
    rounded = Floor(magnitude_half)
    sign = Sign(exact)
    fixed_point = Mul(sign, rounded)
}}

<domain: "dat_deploy.preprocessing", opset_import: ["": 18]>
round_to_8_bits (fixed_point) => (levels)
{{
    to_fixed_point = Constant <value = double {{4194304.0}}> ()
    half = Constant <value = double {{0.5}}> ()
    black = Constant <value = double {{0.0}}> ()
    white = Constant <value = double {{255.0}}> ()
    exact = Div(fixed_point, to_fixed_point)
    exact_half = Add(exact, half)
    rounded = Floor(exact_half)
    levels = Clip(rounded, black, white)
}}
"""


def preprocessing_graph(preprocessing: Preprocessing) -> onnx.ModelProto:
    """A graph that does to a batch of pictures what `preprocess` does to one.

    Its input `pixels` [B, H, W, 3] uint8 holds RGB pictures of any one size; its output `image` [B, 3, h, w] float32 is
    the network's input, of the size of the crop. Only what the crop keeps is computed.
    """
    (height, width), (resize_height, resize_width) = preprocessing.image_size, preprocessing.resize_size
    top = round((resize_height - height) / 2.0)
    left = round((resize_width - width) / 2.0)
    model = onnx.parser.parse_model(
        _GRAPH.format(
            height=height,
            width=width,
            resize_height=resize_height,
            resize_width=resize_width,
            top=top,
            bottom=top + height,
            left=left,
            right=left + width,
            mean=", ".join(f"{value:.17g}" for value in preprocessing.mean),
            std=", ".join(f"{value:.17g}" for value in preprocessing.std),
        )
    )
    model.producer_name = "dat-deploy"
    onnx.checker.check_model(model, full_check=True)
    return model
