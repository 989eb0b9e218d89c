"""Fast roads to the numbers of pde_ssm.py, which it never imports."""
