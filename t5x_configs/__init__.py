# SPDX-License-Identifier: Apache-2.0
"""Gin files of this project; a package, so that installers copy them and gin finds them."""
