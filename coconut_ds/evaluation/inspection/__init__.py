"""What the latents hold: what they decode to, attend to, and how near they come to the steps they replace.

Knows: trained models and single problems.  Does not know: training, accuracy over a data set.
"""
