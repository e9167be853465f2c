"""Looking after the installation and the accounts: doctor, inventory, stop all."""
