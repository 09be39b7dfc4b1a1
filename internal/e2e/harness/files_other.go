//go:build !unix

package harness

import "errors"

func limitFiles(int) error { return errors.ErrUnsupported }
