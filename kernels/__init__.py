"""Operators of trainc, one file each: contract, reference, CPU path, fake, autograd and autocast rules."""
