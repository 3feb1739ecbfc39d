"""Curvatures on a mesh of devices: which device holds and decomposes what.

A and G are split over all the axes that split their weight, each along one side, and EK-FAC's
eigenvalues as the weight; a side that the devices do not divide (d_in and one for a bias) is
whole. Each device decomposes some of the factors; leading eigenvectors alone are iterated with
products made where the matrix lies, and lie as its rows do. Requests, and the batches of
`unlearn`, are split where their rows are.

`group_bytes=` takes the parameters in groups whose sums take so much of a device, a pass for
each, and `offload` keeps finished factors in the host's memory, from which `solve` fetches them
block by block (`batch_unlearn` fetches them all).

`tests/many_devices` runs one program (estimate, groups, solve, EK-FAC, batch unlearning, sums,
the loop) on one device, on eight under FSDP and tensor parallelism, and in two processes of
four under both and with split layers: all numbers agree to 1e-12 of their scale in float64, and
no instruction of the compiled `solve`, `apply_edit` and (tensor parallel) estimate has the
shape of a whole split weight; under FSDP an estimate has those of the model's own passes, which
fetch a layer's weight at a time, and no other.

`tests/checkpoint` saves, kills and takes up again what two processes estimate and train together,
leading eigenvectors (`rank=`) in each way among it. Of what each process decomposes for itself all
are given the first one's, for machines differ. No accelerator was at hand: this is about what is
computed and where, not how fast.
"""
