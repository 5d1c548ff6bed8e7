# SPDX-License-Identifier: Apache-2.0
"""`report.html`: what a compression did, as one page without network."""
