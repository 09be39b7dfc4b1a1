//go:build !unix

package mesh

import "errors"

func limitFiles(int) error { return errors.ErrUnsupported }
