"""What the package offers to other frameworks, a module for each. Importing this package imports none of them."""
