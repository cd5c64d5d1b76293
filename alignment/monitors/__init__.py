"""What a policy does when it games its judge, found in the words of its responses."""
