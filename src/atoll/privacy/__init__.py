"""What the server may not see, and what a release may not tell: masks, noise, and the accounts of both."""
