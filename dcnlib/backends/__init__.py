"""The backends: one folder or file each, all with the same functions.

A backend is a module with

``name``
    what ``backend=`` and `dcnlib.backends` call it.
``why_not(device)``
    None when it can run on that device ("cpu", "cuda"), otherwise the reason, with the cure.
``forward(problem, input, offset, weight, bias, mask, output, num_threads=None)``
    fills `output`. `offset` None stands for a plain convolution (cpu only).
``backward(problem, grad_output, input, offset, weight, mask, grads, num_threads=None)``
    fills `grads`: operands for input, offset, weight, bias, mask, or None where nobody asks.
``roi_pool_forward(problem, input, rois, offset, mask, output, num_threads=None)``,
``roi_pool_backward(problem, grad_output, input, rois, offset, mask, grads, num_threads=None)``
    the same for RoI pooling; `grads` for input, offset, mask. `rois` is float64 in any call, and its
    image numbers are those of images.
``resample_forward(problem, input, offset, output, num_threads=None)``,
``resample_backward(problem, grad_output, input, offset, grads, num_threads=None)``
    the same for resampling; `grads` for input, offset.

An operand is a C-contiguous, aligned, native-endian NumPy array in the shape that
the problem gives, or the integer address of such memory. With
``problem.channels_last`` the memory of input, output, grad_output and grad_input is (N, H, W, C).
Callers check and allocate; backends trust, read inputs only and write every element of outputs.
"""
