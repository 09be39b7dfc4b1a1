//go:build !unix

package redistest

import "errors"

// pauseProcess and resumeProcess need signals that only Unix has.
func pauseProcess(int) error  { return errors.ErrUnsupported }
func resumeProcess(int) error { return errors.ErrUnsupported }
