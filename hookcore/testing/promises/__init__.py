"""The promises of the contract kit, by what they are about; `hookcore.testing.contract` joins them."""
