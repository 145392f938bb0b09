"""What people look at: tables on a terminal, pictures of a front."""
