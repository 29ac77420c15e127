"""``python -m regrpo``, which is what ``torchrun -m regrpo`` runs."""

from regrpo.cli import main

main()
