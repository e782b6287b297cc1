"""The asv suite of dcnlib: one file a question, parameters that are the same on every machine.

grid        kernel x stride x dilation on a real layer: time, throughput, memory
layers      the layers of real networks, by dtype; the error beside the speed
threads     1, 2 and 4 threads
isas        each instruction set
overhead    what a call costs that has nothing to compute, layer by layer
start       import, wheel size
torch_door  the same calls through torch, with gradients
rival       other people's operators on the same arrays

common.py says what a case is and how a call is made; memory.py and rivals.py measure and call.
What a machine or an environment lacks is skipped in `setup`, with the reason.
"""
