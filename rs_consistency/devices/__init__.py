"""The devices that compute: how they share work, what their compilers want, and the host they hang on."""
