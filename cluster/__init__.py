"""Where actors run: placement, launch, supervision, object references and the Serve deployment."""
