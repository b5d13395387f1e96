"""Selection methods: one file a method, one registry that names them."""
