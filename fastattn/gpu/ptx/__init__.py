"""PTX: the only place with instruction text, one file per instruction family. Kernels and the small files of gpu/ import from here."""
