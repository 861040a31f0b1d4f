"""What tests of convolutions share."""

import numpy as np
from hypothesis import strategies as st


def definition(x, kernel, bias, stride, padding):
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    kh, kw = kernel.shape[:2]
    height, width = ((x.shape[1 + i] - k) // stride + 1 for i, k in enumerate((kh, kw)))
    out = np.zeros((x.shape[0], height, width, kernel.shape[3])) + bias
    for i in range(kh):
        for j in range(kw):
            window = x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
            out += window @ np.asarray(kernel[i, j], np.float64)
    return out


sides = st.tuples(st.integers(0, 2), st.integers(0, 2))
