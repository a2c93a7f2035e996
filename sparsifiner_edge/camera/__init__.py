"""Running bundles on what a camera gives: for now, pictures and folders of them."""
