"""`llmshrink bench kernels`: how near the kernels come to what the device can do, beside others in the same run.

    problem      the shapes, the random weight that everybody multiplies by, the floor under any kernel's time
    contenders   ours, the vendor's library and other packages' kernels: each turns one weight into a function of x
    clock        ceilings of the device, and the time of a call under a CUDA graph, over copies that the L2 can't hold
    run          correctness first, then time, row by row into one JSON file
    plot         the same as a roofline

Nothing is timed before its result was held to float64; what is wrong or not installed is a line that says so.
"""
