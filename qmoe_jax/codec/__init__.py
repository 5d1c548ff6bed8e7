# SPDX-License-Identifier: Apache-2.0
"""The dictionary code: trits to words, words to trits, and the bits they take."""
