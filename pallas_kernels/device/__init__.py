# SPDX-License-Identifier: Apache-2.0
"""Device code: the bodies of the kernels and their launches, nothing else."""
